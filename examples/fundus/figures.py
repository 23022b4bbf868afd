"""Figures of an adaptation: contours on photographs, and gradient alignment over the stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from examples.common.adaptation import Stream
from examples.common.datasets import Sample
from examples.common.scores import CaseScores

LineStyle: TypeAlias = Literal["solid"] | tuple[float, Sequence[float]]

# Okabe and Ito's colours, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
DISC_COLOUR, CUP_COLOUR = "#56B4E9", "#F0E442"
STYLES: tuple[tuple[str, str, LineStyle], ...] = (
    ("disc", DISC_COLOUR, "solid"),
    ("cup", CUP_COLOUR, (0, (3, 1.5))),
)
HALO = [Stroke(linewidth=2.6, foreground="black"), Normal()]  # legible on bright and dark tissue
POINT_COLOUR, LINE_COLOUR = "#0072B2", "#D55E00"
DPI = 150
WINDOW = 10  # images in a running mean
SPECK = 10  # pixels; smaller regions are left out of contours


def spread(count: int, length: int) -> list[int]:
    """Indices of `count` images spread evenly over a stream, whatever their scores.

    Example:
        >>> spread(2, 100)
        [25, 75]
    """
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def without_specks(mask: Bool[Tensor, "h w"], smallest: int = SPECK) -> Bool[Tensor, "h w"]:
    """A mask without its small regions and holes (4-connected), for drawing.

    The prediction of a barely trained model is peppered with them, and their contours would hide
    all else.

    Args:
        mask: of one structure.
        smallest: pixels of the smallest region, and of the smallest hole, that stays.

    Example:
        >>> mask = torch.zeros(4, 4, dtype=torch.bool)
        >>> mask[0, 0] = mask[2:, 2:] = True
        >>> without_specks(mask, smallest=2).nonzero().tolist()
        [[2, 2], [2, 3], [3, 2], [3, 3]]
    """
    return ~_large_regions(~_large_regions(mask, smallest), smallest)


def _large_regions(mask: Bool[Tensor, "h w"], smallest: int) -> Bool[Tensor, "h w"]:
    """The 4-connected regions of at least `smallest` pixels.

    Every pixel has a number, and each round hands it the largest of its neighbours'. After
    `smallest` − 1 rounds a smaller region is of one number; one whose numbers still grow is larger.
    """
    labels = torch.arange(1.0, mask.numel() + 1, dtype=torch.float64).reshape(mask.shape) * mask
    for _ in range(smallest):
        before = labels
        along = F.max_pool2d(before[None], (1, 3), stride=1, padding=(0, 1))
        across = F.max_pool2d(before[None], (3, 1), stride=1, padding=(1, 0))
        labels = torch.maximum(along, across)[0] * mask
    numbers = before.long().flatten()
    grown = (labels != before).flatten()
    large = (numbers.bincount() >= smallest) | (numbers.bincount(grown.double()) > 0)
    return large[numbers].reshape(mask.shape) & mask


def draw_contours(axes: Axes, sample: Sample, masks: Float[Tensor, "2 h w"] | None) -> None:
    """Draws a photograph, and disc and cup on it as contours."""
    axes.imshow(sample.image.permute(1, 2, 0).numpy(), interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if masks is None:
        return
    for mask, (_, colour, style) in zip(masks.numpy(), STYLES, strict=True):
        if mask.min() < mask.max():  # an empty mask has no contour
            lines = axes.contour(
                mask, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=[style]
            )
            lines.set_path_effects(HALO)


def save_predictions(
    path: Path,
    rows: Sequence[tuple[str, Sample, Mapping[str, tuple[Tensor, CaseScores]]]],
) -> None:
    """Saves a grid: a row per image; photograph, ground truth and each method's prediction.

    Args:
        path: of the PNG.
        rows: target, sample, and by method prediction and score; the same methods in each row.
    """
    methods = list(rows[0][2])
    columns = 2 + len(methods)
    figure = Figure(figsize=(1.75 * columns, 1.95 * len(rows) + 0.75), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, (target, sample, predictions) in zip(grid, rows, strict=True):
        draw_contours(axes_row[0], sample, None)
        axes_row[0].set_ylabel(target, fontsize=9)
        draw_contours(axes_row[1], sample, sample.target)
        for axes, method in zip(axes_row[2:], methods, strict=True):
            prediction, score = predictions[method]
            drawn = torch.stack([without_specks(mask) for mask in prediction])
            draw_contours(axes, sample, drawn.float())
            scores = (f"{name} {value:.1f}%" for name, value in score.scores.items())
            axes.set_xlabel(", ".join(scores), fontsize=7.5)
    for axes, title in zip(grid[0], ["photograph", "ground truth", *methods], strict=True):
        axes.set_title(title, fontsize=9)
    handles = [
        Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=name, path_effects=HALO)
        for name, colour, style in STYLES
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9,
        title="Numbers are Dice scores; images are evenly spaced in the stream. Contours of "
        f"predictions\nleave out specks and holes of fewer than {SPECK} pixels.", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=DPI)


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
