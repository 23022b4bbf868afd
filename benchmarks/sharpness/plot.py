"""The comparison as pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from benchmarks.alignment.plot import COLOURS
from benchmarks.sharpness import landscape
from benchmarks.sharpness.methods import REFERENCE

Row = Mapping[str, Any]
_DARK, _LIGHT = "#222222", "#bbbbbb"
_COLUMNS = 4
_FAR = 5.0
"""Points of accuracy by which a method that fails here is worse than plain training."""


def plot_landscape(rows: Sequence[Row], paths: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """A panel per method: contours of the loss and the path from each start."""
    across, up = torch.linspace(-3.6, 3.6, 241), torch.linspace(-1.6, 1.6, 121)
    points = torch.stack(torch.meshgrid(across, up, indexing="xy"), dim=-1)
    height = landscape.loss(points).numpy()
    lines = math.ceil(len(rows) / _COLUMNS)
    figure = Figure(
        figsize=(2.6 * min(len(rows), _COLUMNS) + 0.4, 1.45 * lines + 0.8), layout="constrained"
    )
    grid = figure.subplots(lines, min(len(rows), _COLUMNS), sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        axes.set_title(f"{row['method']}: {row['flat']} of {row['starts']}", fontsize=8, pad=3)
        axes.contour(
            across, up, height, levels=[0.1, 0.3, 0.6, 1, 1.5, 2, 2.5, 3, 4], colors=_LIGHT,
            linewidths=0.6,
        )  # fmt: skip
        for steps, colour in zip(paths[row["method"]], COLOURS, strict=False):
            axes.plot(steps[:, 0], steps[:, 1], color=colour, linewidth=0.7)
            axes.plot(*steps[0], color=colour, marker="x", markersize=4)
            axes.plot(
                *steps[-1], color=colour, marker="o", markersize=5, markeredgecolor="white",
                markeredgewidth=0.6, zorder=5,
            )  # fmt: skip
        axes.set_xlim(-3.6, 3.6)
        axes.set_ylim(-1.6, 1.6)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(rows) - grid.shape[1] : len(rows)]:
        axes.tick_params(labelbottom=True)  # the lowest of each column
    figure.supxlabel(
        "with each name: how many of the paths end in the flat well, on the right", fontsize=9
    )
    figure.legend(
        handles=[
            Line2D([], [], color=_LIGHT, label="loss"),
            Line2D([], [], color="#666666", linestyle="none", marker="x", label="start"),
            Line2D([], [], color="#666666", linestyle="none", marker="o", label="end"),
        ],
        loc="outside upper center", ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def plot_digits(
    default: Sequence[Row], chosen: Sequence[Row], times: Mapping[str, float], path: Path
) -> None:
    """A line per method: difference to plain training, curvature and cost.

    A difference that is far beyond all others is written at the edge.
    """
    plain = next(line for line in chosen if line["method"] == REFERENCE)
    names = [line["method"] for line in chosen if line["method"] != REFERENCE]
    figure = Figure(figsize=(9, 1.6 + 0.28 * max(len(names), 1)), layout="constrained")
    gain, curvature, cost = figure.subplots(1, 3, sharey=True, width_ratios=(1.6, 1, 1))
    gain.axvline(0, color=_DARK, linewidth=0.8)
    kinds = (
        (default, COLOURS[4], -0.17, "default rho"),
        (chosen, COLOURS[0], 0.17, "chosen rho"),
    )
    for lines, colour, shift, _ in kinds:
        by_name = {line["method"]: line for line in lines}
        for place, name in enumerate(names):
            if name not in by_name:
                continue
            one = by_name[name]["difference"]
            if one["mean"] < -_FAR:
                gain.annotate(
                    f"◂ {one['mean']:.1f}", (0, place + shift), (2, 0), fontsize=7, color=colour,
                    xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                )  # fmt: skip
                continue
            certain = one["low"] > 0 or one["high"] < 0
            gain.errorbar(
                [one["mean"]], [place + shift],
                xerr=[[one["mean"] - one["low"]], [one["high"] - one["mean"]]],
                color=colour, marker="o", markerfacecolor=colour if certain else "white",
                markersize=4, capsize=2, linewidth=1,
            )  # fmt: skip
    gain.set_xlabel(f"accuracy minus {REFERENCE}, points", fontsize=8)
    by_name = {line["method"]: line for line in chosen}
    for axes, level, values, title in (
        (
            curvature, plain["eigenvalue"], [by_name[name]["eigenvalue"] for name in names],
            f"largest eigenvalue (line: {REFERENCE})",
        ),
        (cost, 1.0, [times[name] for name in names], f"time of a step / {REFERENCE}"),
    ):  # fmt: skip
        axes.axvline(level, color=_DARK, linewidth=0.8)
        axes.plot(
            values, range(len(names)), color=COLOURS[0], marker="o", markersize=4, linestyle="none"
        )
        axes.set_xlabel(title, fontsize=8)
    values = [plain["eigenvalue"], *(by_name[name]["eigenvalue"] for name in names)]
    if 0 < 4 * min(values) < max(values):
        curvature.set_xscale("log")
        curvature.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        curvature.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        curvature.xaxis.set_minor_locator(NullLocator())
    else:
        curvature.xaxis.set_major_locator(MaxNLocator(4))
    cost.set_xlim(left=0)
    gain.set_yticks(range(len(names)), names)
    gain.set_ylim(len(names) - 0.5, -0.5)
    for axes in (gain, curvature, cost):
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supxlabel(
        "95% intervals, filled where they do not contain 0; the two other columns with the "
        "chosen rho",
        fontsize=8,
    )
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker="o", markersize=4, linewidth=1, label=label)
            for _, colour, _, label in kinds
        ],
        loc="outside upper left", ncols=2, frameon=False, fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=120)
