"""Figure 4 of the paper: how close each gradient is to that of the labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.alignment.plot import COLOURS


def plot_cosines(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A group of bars for each source centre: the mean cosine of each variant.

    Args:
        lines: with the mean over the images of a source's targets, by source.
        path: of the PNG.
    """
    sources = list(lines[0]["empirical_by_source"])
    groups = [*sources, "average"]
    figure = Figure(figsize=(1.6 + 1.25 * len(groups), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(lines)
    for place, line in enumerate(lines):
        values = list(line["empirical_by_source"].values())
        values.append(sum(values) / len(values))
        left = [group + (place - (len(lines) - 1) / 2) * width for group in range(len(groups))]
        pair, aligned = divmod(place, 2)  # each objective without alignment, then with it
        axes.bar(
            left, values, 0.9 * width, label=line["title"],
            color=_paler(COLOURS[pair], 1.0 if aligned else 0.45),
        )  # fmt: skip
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("mean cosine with\nthe gradient of the labels")
    axes.set_xlabel("source centre")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _paler(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white, of which it is this share; opaque, so that no grid shines through.

    Example:
        >>> _paler("#000000", 0.25)
        (0.75, 0.75, 0.75)
    """
    return tuple(1 - share * (1 - part) for part in to_rgb(colour))
