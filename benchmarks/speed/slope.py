"""How a step's ratio to its floor grows with the number of objectives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.timing import RATIO
from benchmarks.tables import Row, interval, table

ABOUT = (
    "The ratio to the floor at each K, and lines fitted to it and to the milliseconds above the "
    "floor: what one objective more adds. Beside it stands what the bandwidth allows: 3 reads and "
    "1 write of P numbers."
)
_METHOD = "PCGrad, K = "
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s")

Place = tuple[str, str, str]  # network, case, variant


def by_objectives(rows: Sequence[Row]) -> dict[Place, dict[int, Row]]:
    """PCGrad's rows in gradkit's engines by K, where there are at least two."""
    found: dict[Place, dict[int, Row]] = {}
    for row in rows:
        ours = row["variant"] in map(gradkit_name, ENGINES)
        if row["measure"] == RATIO and ours and row["method"].startswith(_METHOD):
            place = (row["network"], row["case"], row["variant"])
            found.setdefault(place, {})[int(row["method"].removeprefix(_METHOD))] = row
    return {place: line for place, line in found.items() if len(line) > 1}


def slope(points: Mapping[int, float]) -> float:
    """That of the line of least squares.

    Example:
        >>> round(slope({2: 1.0, 4: 1.5, 8: 2.5}), 9)
        0.25
    """
    k = torch.tensor(list(points), dtype=torch.float64)
    values = torch.tensor(list(points.values()), dtype=torch.float64)
    centred = k - k.mean()
    return float(centred @ values / (centred @ centred))


def slope_table(rows: Sequence[Row], floors: Sequence[Row]) -> str:
    """A line for each network, case and engine."""
    lines = by_objectives(rows)
    counts = sorted({count for line in lines.values() for count in line})
    # Of the 4K + 1 vectors that are read or written, 4 for each objective.
    allowed = {
        (floor["network"], floor["case"]): (
            floor["milliseconds"] * 4 / (floor["reads"] + floor["writes"])
        )
        for floor in floors
        if floor["method"].startswith(_METHOD)
    }
    head = ("network", "case", "variant", *(f"K = {count}" for count in counts))
    head += ("ratio per objective", "ms per objective", "ms by bandwidth")
    return table(
        head,
        len(counts) + 3,
        (
            (
                *place,
                *(interval(line[count]) if count in line else "" for count in counts),
                f"{slope({count: row['value'] for count, row in line.items()}):+.3f}",
                f"{slope({count: row['excess'] for count, row in line.items()}):.1f}",
                f"{allowed[place[:2]]:.1f}" if place[:2] in allowed else "",
            )
            for place, line in lines.items()
        ),
    )


def plot_slopes(record: Mapping[str, Any], path: Path) -> None:
    """Write a picture of the ratios against K; none where there is only one K."""
    lines = by_objectives(record["rows"])
    if not lines:
        return
    places = list(dict.fromkeys(place[:2] for place in lines))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=0.8)
    for (network, case, variant), line in lines.items():
        counts = sorted(line)
        values = [line[count]["value"] for count in counts]
        below = [line[count]["value"] - line[count]["low"] for count in counts]
        above = [line[count]["high"] - line[count]["value"] for count in counts]
        axes.errorbar(
            counts,
            values,
            yerr=[below, above],
            label=f"{network}, {case}, {variant.removeprefix('gradkit, ')}",
            color=_COLORS[places.index((network, case)) % len(_COLORS)],
            marker=_MARKERS[variant == gradkit_name(ENGINES[1])],
            linestyle="-" if variant == gradkit_name(ENGINES[0]) else "--",
            markersize=5,
            capsize=2,
            linewidth=1,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({count for line in lines.values() for count in line}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("K, objectives of PCGrad")
    axes.set_ylabel("a step / its floor, with its 95% interval")
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
