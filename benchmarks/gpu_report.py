"""What `python -m benchmarks.gpu` has measured, as Markdown."""

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.comparison import FLOOR
from benchmarks.speed.tta import ABOUT, GOALS_ON_CUDA, tta_table
from benchmarks.tables import interval, section, table

MEMORY = "peak memory above plain training, P numbers"


def as_markdown(record: Mapping[str, Any]) -> str:
    """The tables."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    parts = [
        "# What a step costs on a CUDA device",
        f"Made by `{record['command']}`.\n\nMachine: {machine}.",
        "All variants of a comparison take turns in one process, in an order that changes from "
        "round to round; a step is timed by events, from an idle device to an idle device. Ratios "
        "are medians of the ratios within rounds, with 95% bootstrap intervals.",
    ]
    floors = {_place(floor): floor for floor in record["floors"]}
    lines = []
    for row in record["rows"]:
        floor, is_floor = floors.get(_place(row), {}), row["variant"] == FLOOR
        lines.append(
            (
                *_place(row),
                f"floor: {floor.get('passes', '')}" if is_floor else row["variant"],
                f"{row['milliseconds']:.2f}",
                "1" if is_floor else interval(row),
                "" if is_floor else f"{row['excess']:.2f}",
                f"{floor.get('milliseconds', float('nan')):.2f}" if is_floor else "",
                str(row["rounds"]),
            )
        )
    head = ("network", "case", "method", "variant", "ms", "ratio to the floor")
    head += ("ms above it", "ms of its traffic", "rounds")
    parts += section("Steps", table(head, 5, lines))
    overhead = [(row["method"], row["variant"], interval(row, 3)) for row in record["overhead"]]
    parts += section(
        "Overhead per step",
        "Milliseconds above the same passes by hand, on a 3-layer MLP.",
        table(("method", "variant", "ms"), 1, overhead),
    )
    parts += section("Adaptation at once", ABOUT, tta_table(record["adaptation"], GOALS_ON_CUDA))
    memory = [(r["method"], r["variant"], f"{r['value']:.2f}") for r in record["memory"]]
    parts += section("Peak memory", MEMORY, table(("method", "variant", "P numbers"), 1, memory))
    waits = [(row["method"], row["variant"], row["waits"]) for row in record["waits"]]
    parts += section(
        "What makes the host wait",
        'With `nonfinite="ignore"` and a learning rate on the device.',
        table(("method", "variant", "waits"), 0, waits),
    )
    launches = [(*_place(r), r["variant"], str(r["launches"])) for r in record["launches"]]
    head = ("network", "case", "method", "variant", "launches")
    parts += section("Kernel launches beyond the floor's", table(head, 1, launches))
    if record["left out for want of time"]:
        parts += ["## Left out for want of time", "; ".join(record["left out for want of time"])]
    for failed in record["errors"]:
        parts += [f"## Failed: {failed['part']}", f"```\n{failed['error']}```"]
    return "\n\n".join(parts) + "\n"


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["network"], row["case"], row["method"]
