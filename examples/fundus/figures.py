"""Figures of an adaptation: contours on photographs, and gradient alignment over the stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from examples.common.adaptation import Stream
from examples.common.contours import DPI, Outline, save_contours
from examples.common.datasets import Sample
from examples.common.scores import CaseScores

# Okabe and Ito's colours, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
OUTLINES = (
    Outline("disc", "#56B4E9"),
    Outline("cup", "#F0E442", (0, (3, 1.5))),
)
POINT_COLOUR, LINE_COLOUR = "#0072B2", "#D55E00"
WINDOW = 10  # images in a running mean


def save_predictions(
    path: Path,
    rows: Sequence[tuple[str, Sample, Mapping[str, tuple[Tensor, CaseScores]]]],
) -> None:
    """Saves a grid: a row per image; photograph, ground truth and each method's prediction.

    Args:
        path: of the PNG.
        rows: target, sample, and by method prediction and score; the same methods in each row.
    """
    captioned = [
        (
            target,
            sample,
            {
                method: (
                    prediction,
                    ", ".join(f"{name} {value:.1f}%" for name, value in score.scores.items()),
                )
                for method, (prediction, score) in predictions.items()
            },
        )
        for target, sample, predictions in rows
    ]
    save_contours(
        path,
        captioned,
        OUTLINES,
        "photograph",
        "Numbers are Dice scores; images are evenly spaced in the stream.",
    )


def save_alignment(path: Path, streams: Mapping[str, Stream]) -> None:
    """Saves what `draw_alignment` draws as a PNG."""
    draw_alignment(streams).savefig(path, dpi=DPI)


def draw_alignment(streams: Mapping[str, Stream]) -> Figure:
    """Draws cosine and learning-rate scale over the stream, a column for each target.

    Args:
        streams: by target; those of GraTa, which alone records them.
    """
    figure = Figure(figsize=(1.0 + 3.2 * len(streams), 4.4), layout="constrained")
    grid = figure.subplots(2, len(streams), squeeze=False, sharex="col", sharey="row")
    for (target, stream), column in zip(streams.items(), grid.T, strict=True):
        column[0].set_title(target, fontsize=10)
        column[0].axhline(0, color="0.6", linewidth=0.8)
        for axes, values in zip(column, (stream.cosines, stream.lr_scales), strict=True):
            order = np.arange(1, len(values) + 1)
            axes.plot(order, values, ".", color=POINT_COLOUR, markersize=4, label="image")
            if len(values) >= WINDOW:
                smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
                axes.plot(
                    order[WINDOW - 1 :], smooth, color=LINE_COLOUR, linewidth=1.8,
                    label=f"mean of the last {WINDOW}",
                )  # fmt: skip
            axes.grid(color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel("image in the stream (number)")
    grid[0, 0].set(ylabel="cosine of pseudo and\nauxiliary gradient", ylim=(-1.05, 1.05))
    grid[1, 0].set(ylabel="learning-rate scale\n(factor)", ylim=(-0.025, 1.025))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
