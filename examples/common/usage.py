"""Options that cannot be carried out: one line, with what to write instead."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from examples.common.device import choose_device
from examples.common.suggestions import did_you_mean


class UsageError(ValueError):
    """An option is wrong; the message is one line with the valid choices."""


def require(holds: bool, message: str) -> None:
    """Raises a UsageError with the message unless the condition holds."""
    if not holds:
        raise UsageError(message)


def refuse_to_replace(files: Iterable[Path]) -> None:
    """Makes sure that none of the files exists.

    Raises:
        UsageError: one does.
    """
    for file in files:
        require(
            not file.exists(),
            f"{file} is there from an earlier run; choose another --out, or replace it with "
            f"--overwrite",
        )


def split_names(
    option: str,
    text: str,
    choices: Sequence[str],
    single: bool = False,
    source: str | None = None,
) -> list[str]:
    """The names in a comma-separated list.

    Args:
        option: the option's name, for messages.
        text: the list.
        choices: valid names.
        single: only one name is allowed.
        source: a name that is no choice because it is the source centre, for the message.

    Raises:
        UsageError: a name is unknown, empty or there twice, or more than one where one is allowed.
    """
    names = [name.strip() for name in text.split(",")]
    valid = f"choose from {', '.join(choices)}"
    require(not single or len(names) == 1, f"{option} is {text!r}, more than one name; {valid}")
    for name in names:
        require(name != source, f"{option} contains the source {name!r}; {valid}")
        guess = did_you_mean(name, choices)
        require(name in choices, f"{option} contains the unknown name {name!r}; {valid}{guess}")
        require(names.count(name) == 1, f"{option} contains {name!r} twice; {valid}, each once")
    return names


def open_device(name: str, threads: int = 1) -> torch.device:
    """The named device; work on a CPU is left to this many threads from now on.

    Raises:
        UsageError: there is no such device.
    """
    try:
        device = choose_device(name)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error
    torch.set_num_threads(threads)
    return device


def require_empty(directory: Path) -> None:
    """Makes sure that a folder is empty or missing.

    Raises:
        UsageError: it is not.
    """
    require(
        not directory.is_dir() or not any(directory.iterdir()),
        f"{directory} is not empty; choose a new folder for --out",
    )


def check_writable(directory: Path) -> None:
    """Makes a directory if it is missing, and makes sure that files can be written to it.

    Raises:
        UsageError: they cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written to ({error.strerror}); choose another --out"
        ) from error
