"""Contours of segmentations on images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from examples.common.datasets import Sample

LineStyle: TypeAlias = Literal["solid"] | tuple[float, Sequence[float]]

HALO = [Stroke(linewidth=2.6, foreground="black"), Normal()]  # legible on bright and dark tissue
DPI = 150
SPECK = 10  # pixels; smaller regions are left out of contours


@dataclass(frozen=True)
class Outline:
    """How the contour of a structure is drawn.

    Attributes:
        name: of the structure.
        colour: of the line.
        style: of the line.
    """

    name: str
    colour: str
    style: LineStyle = "solid"


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


def draw_contours(
    axes: Axes,
    sample: Sample,
    masks: Float[Tensor, "structures h w"] | None,
    outlines: Sequence[Outline],
) -> None:
    """Draws an image, grey or in colours in [0, 1], and structures on it as contours."""
    pixels = sample.image.permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if masks is None:
        return
    for mask, outline in zip(masks.numpy(), outlines, strict=True):
        if mask.min() < mask.max():  # an empty mask has no contour
            lines = axes.contour(
                mask,
                levels=[0.5],
                colors=[outline.colour],
                linewidths=1.3,
                linestyles=[outline.style],
            )
            lines.set_path_effects(HALO)


def save_contours(
    path: Path,
    rows: Sequence[tuple[str, Sample, Mapping[str, tuple[Tensor, str]]]],
    outlines: Sequence[Outline],
    kind: str,
    note: str,
) -> None:
    """Saves a grid: a row per image; the image, ground truth and each method's prediction.

    Args:
        path: of the PNG.
        rows: a label, the sample, and by method the prediction [structures, h, w] and what stands
            below it; the same methods in each row.
        outlines: of the structures.
        kind: of image, which heads the first column.
        note: on what is shown, below it.
    """
    methods = list(rows[0][2])
    columns = 2 + len(methods)
    figure = Figure(figsize=(1.75 * columns, 1.95 * len(rows) + 0.75), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, (label, sample, predictions) in zip(grid, rows, strict=True):
        draw_contours(axes_row[0], sample, None, outlines)
        axes_row[0].set_ylabel(label, fontsize=9)
        draw_contours(axes_row[1], sample, sample.target, outlines)
        for axes, method in zip(axes_row[2:], methods, strict=True):
            prediction, text = predictions[method]
            drawn = torch.stack([without_specks(mask) for mask in prediction])
            draw_contours(axes, sample, drawn.float(), outlines)
            axes.set_xlabel(text, fontsize=7.5)
    for axes, title in zip(grid[0], [kind, "ground truth", *methods], strict=True):
        axes.set_title(title, fontsize=9)
    handles = [
        Line2D(
            [], [], color=outline.colour, linestyle=outline.style, linewidth=1.6,
            label=outline.name, path_effects=HALO,
        )
        for outline in outlines
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(outlines), frameon=False, fontsize=9,
        title=f"{note} Contours of predictions\nleave out specks and holes of fewer than "
        f"{SPECK} pixels.", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=DPI)
