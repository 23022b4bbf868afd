"""Results files, and the command that they were made with."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from examples.common.usage import require
from examples.fundus.data import SYNTHETIC

ELSEWHERE = ("out", "models", "overwrite", "workers", "processes")
"""Options that change nothing about the results."""


def write_results(record: Mapping[str, Any], text: str, out: Path, name: str) -> None:
    """Writes OUT/NAME.json for programs and OUT/NAME.md for people."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name}.md").write_text(text)


def check_name(name: str) -> None:
    """Makes sure that results of this name are files of their folder.

    Raises:
        UsageError: the name is empty, hidden or has a folder.
    """
    require(
        name != "" and Path(name).name == name and not name.startswith("."),
        f"--name is {name!r}; give a file name without folder and ending, such as seed1; --out is "
        "the folder",
    )


def command_line(name: str, command: Any, hidden: tuple[str, ...] = ()) -> str:
    """The command with these options, without those that have their default.

    A folder of data is DATA, one of models that must be given MODELS, and one of models with heads
    HEADS: where they are on one machine is of no interest elsewhere.

    Args:
        name: of the benchmark.
        command: a dataclass with its options.
        hidden: further options that change nothing.

    Example:
        >>> from benchmarks.gsema import GSEMA
        >>> command_line("gsema", GSEMA(seeds=3))
        'python -m benchmarks gsema --seeds 3'
    """
    words = [f"python -m benchmarks {name}"]
    for field in fields(command):
        value, option = getattr(command, field.name), field.name.replace("_", "-")
        if field.name == "models" and field.default is MISSING:
            words.append("--models MODELS")
        if field.name in (*ELSEWHERE, *hidden) or value == field.default:
            continue
        if field.name in ("data", "data_root") and value != SYNTHETIC:
            value = "DATA"
        if field.name == "heads":
            value = "HEADS"
        if isinstance(field.default, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {shlex.quote(str(value))}")
    return " ".join(words)
