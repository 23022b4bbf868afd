"""The measurements as Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.speed import rules, sharpness, slope, stream, tta, weights
from benchmarks.speed.comparison import FLOOR
from benchmarks.speed.goals import verdict
from benchmarks.speed.memory import MEMORY, RESOLUTION
from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.overhead import OVERHEAD
from benchmarks.speed.rules import rules_table
from benchmarks.speed.sharpness import sharpness_table
from benchmarks.speed.slope import slope_table
from benchmarks.speed.stream import stream_table
from benchmarks.speed.timing import RATIO
from benchmarks.speed.tta import tta_table
from benchmarks.speed.weights import weights_tables
from benchmarks.tables import Row, interval, section, table


def report(record: Mapping[str, Any]) -> str:
    """All tables, goals first."""
    rows: Sequence[Row] = record["rows"]
    sections = [
        "# What a step costs",
        _introduction(record),
        *section("Goals", _met(record["goals"]), _goals(record["goals"])),
    ]
    for network, numbers in record["networks"].items():
        here = [row for row in rows if row["measure"] == RATIO and row["network"] == network]
        for method in dict.fromkeys(row["method"] for row in here):
            title = f"{network} ({numbers / 1e6:.1f} M parameters): {method}"
            sections += section(title, _times([row for row in here if row["method"] == method]))
    sections += section("Floors", _ABOUT_FLOORS, _floors(record["floors"], rows))
    slopes = slope_table(rows, record["floors"])
    sections += section("PCGrad against the number of objectives", slope.ABOUT, slopes)
    sections += section("Sharpness-aware steps", sharpness.ABOUT, sharpness_table(rows))
    sections += section("Every rule's step", rules.ABOUT, rules_table(rows))
    sections += section("Rules by themselves", weights.ABOUT, weights_tables(rows))
    sections += section("Many objectives", stream.ABOUT, stream_table(rows))
    sections += section("Adaptation at once", tta.ABOUT, tta_table(rows))
    overhead = [row for row in rows if row["measure"] == OVERHEAD]
    sections += section("Overhead per step", _ABOUT_OVERHEAD, _values(overhead, 3))
    memory = [row for row in rows if row["measure"] == MEMORY]
    settings = ", ".join(f"{name}={value}" for name, value in record["memory environment"].items())
    sections += section("Peak memory", _ABOUT_MEMORY.format(settings), _memory(memory))
    if record["cuda"]:
        sections += section("Launches beyond the floor's", _plain(record["cuda"]["launches"]))
        sections += section("What makes the host wait", _plain(record["cuda"]["waits"]))
    return "\n\n".join(sections) + "\n"


_ABOUT_FLOORS = (
    "Beyond the passes, which are timed, a method must read and write vectors of P numbers (R, W); "
    "at the measured bandwidth of a copy that costs the milliseconds given. Beside it stands what "
    "was measured above the floor's passes."
)
_ABOUT_OVERHEAD = (
    "Milliseconds that gradkit adds to the same forward passes, `torch.autograd.grad` calls and "
    "base step written by hand, on a 3-layer MLP; step and hand-written step in turn."
)
_ABOUT_MEMORY = (
    "Above plain training of the same network with one loss, in units of its P parameters (on a "
    "CPU resident memory: VmHWM), each variant in a fresh process that trains plainly first. The "
    "control makes 3 P numbers on purpose. Set there, so that glibc gives freed blocks back: "
    f"{{}}. Differences below {RESOLUTION} P are not told apart."
)


def _introduction(record: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    return (
        f"Made by `{record['command']}`.\n\nMachine: {machine}. "
        f"Peers: {', '.join(record['peers'])}.\n\n"
        "All variants of a table take turns in one process, in an order that changes from round "
        "to round. Times are medians; ratios are medians of the ratios within rounds, with 95% "
        f"bootstrap intervals (seed {record['seed']})."
    )


def _met(goals: Sequence[Row]) -> str:
    counts = Counter(goal["outcome"] for goal in goals)
    return (
        f"Met: {counts['met']} of {len(goals)}; the median is at most the goal. "
        f"Open: {counts['open']}; the median is above the goal, the interval reaches it. "
        f"Missed: {counts['missed']}; the whole interval is above the goal. Of the goals for every "
        "rule, the table has those that are not met."
    )


def _goals(goals: Sequence[Row]) -> str:
    head = ("measure", "network", "case", "method", "engine", "goal", "measured", "verdict")
    return table(
        head,
        3,
        (
            (
                row["measure"],
                row["network"],
                row["case"],
                row["method"],
                row["variant"].removeprefix("gradkit, "),
                f"≤ {row['limit']:g}",
                interval(row),
                verdict(row),
            )
            for row in goals
            if row["listed"] or row["outcome"] != "met"
        ),
    )


def _times(rows: Sequence[Row]) -> str:
    head = ("case", "variant", "ms", "ratio to the floor", "ms above the floor", "rounds")
    return table(
        head,
        4,
        (
            (
                row["case"],
                row["variant"],
                f"{row['milliseconds']:.2f}",
                "1" if row["variant"] == FLOOR else interval(row),
                "" if row["variant"] == FLOOR else _excess(row),
                str(row["rounds"]),
            )
            for row in rows
        ),
    )


def _excess(row: Row) -> str:
    return f"{row['excess']:.1f} [{row['excess_low']:.1f}, {row['excess_high']:.1f}]"


def _floors(floors: Sequence[Row], rows: Sequence[Row]) -> str:
    def of(floor: Row) -> dict[str, Row]:
        return {
            row["variant"]: row
            for row in rows
            if row["measure"] == RATIO
            and all(row[key] == floor[key] for key in ("network", "case", "method"))
        }

    def line(floor: Row) -> tuple[str, ...]:
        found = of(floor)
        parts = ", ".join(
            f"{name} {reads}R" + (f" {writes}W" if writes else "")
            for name, reads, writes in floor["parts"]
        )
        return (
            floor["network"],
            floor["case"],
            floor["method"],
            floor["passes"],
            f"{found[FLOOR]['milliseconds']:.1f}",
            parts,
            f"{floor['numbers'] / 1e6:.2f} M",
            f"{floor['milliseconds']:.1f}",
            *(
                f"{found[name]['excess']:.1f}" if name in found else ""
                for name in map(gradkit_name, ENGINES)
            ),
        )

    head = (
        "network", "case", "method", "floor in passes", "ms, timed", "floor in traffic", "P",
        "ms, by bandwidth",
        *(f"ms above the passes, {engine}" for engine in ENGINES),
    )  # fmt: skip
    return table(head, 4, map(line, floors))


def _values(rows: Sequence[Row], digits: int) -> str:
    head = ("method", "variant", "ms")
    return table(head, 1, ((row["method"], row["variant"], interval(row, digits)) for row in rows))


def _memory(rows: Sequence[Row]) -> str:
    head = ("network", "method", "variant", "P numbers")
    lines = ((row["network"], row["method"], row["variant"], f"{row['value']:.2f}") for row in rows)
    return table(head, 1, lines)


def _plain(rows: Sequence[Row]) -> str:
    return table(list(rows[0]), 1, ([str(v) for v in row.values()] for row in rows)) if rows else ""
