"""Figures: projections with overlays, latents of the centres, and what the gate did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as Swatch
from numpy.typing import NDArray
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from examples.common.datasets import Sample
from examples.common.tsne import embed
from gradkit.diagnostics import Recorder

# Okabe and Ito's colours, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
VESSEL_COLOUR, ANEURYSM_COLOUR = (0.34, 0.71, 0.91), (0.90, 0.62, 0.0)
CENTRE_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P")
DPI = 150
AXIS = 1  # projections are along it; the first axis runs along the head, upwards
WINDOW = 10  # steps in a running mean


@dataclass(frozen=True)
class Shown:
    """A case in a figure.

    Attributes:
        centre: Where it is from.
        sample: The volume and its target.
        predictions: By method: labels, and the DSC (%) of the aneurysm.
    """

    centre: str
    sample: Sample
    predictions: Mapping[str, tuple[Int[Tensor, "d h w"], float]]


def project(image: Float[Tensor, "1 d h w"]) -> NDArray[np.float32]:
    """The maximum-intensity projection, from 0 to 1, head upwards."""
    flat = image[0].amax(AXIS).flip(0).numpy()
    low, high = np.percentile(flat, (1, 99.5))
    stretched: NDArray[np.float32] = np.clip((flat - low) / max(high - low, 1e-6), 0, 1)
    return stretched


def overlay(
    image: Float[Tensor, "1 d h w"], label: Int[Tensor, "d h w"] | None
) -> NDArray[np.float32]:
    """The projection in grey, with projected vessels and aneurysms in colour above it."""
    picture = np.repeat(project(image)[..., None], 3, axis=-1) * (1.0 if label is None else 0.75)
    if label is not None:
        for value, colour in ((1, VESSEL_COLOUR), (2, ANEURYSM_COLOUR)):
            mask = (label == value).any(AXIS).flip(0).numpy()
            picture[mask] = 0.35 * picture[mask] + 0.65 * np.array(colour)
    return picture.astype(np.float32)


def save_projections(path: Path, rows: Sequence[Shown]) -> None:
    """Saves a row for each case: projection, ground truth, and the prediction of each method."""
    methods = list(rows[0].predictions)
    columns = 2 + len(methods)
    heights = [_height(shown.sample.image) for shown in rows]
    figure = Figure(
        figsize=(1.6 * columns, 1.6 * sum(heights) + 0.25 * len(rows) + 0.6), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes_row, shown in zip(grid, rows, strict=True):
        target = shown.sample.target
        truth = (target[0] + 2 * target[1]).long()
        image = shown.sample.image
        _draw(axes_row[0], overlay(image, None))
        axes_row[0].set_ylabel(shown.centre, fontsize=9)
        _draw(axes_row[1], overlay(image, truth))
        for axes, method in zip(axes_row[2:], methods, strict=True):
            prediction, dsc = shown.predictions[method]
            _draw(axes, overlay(image, prediction))
            axes.set_xlabel(f"{dsc:.1f}%", fontsize=8)
    for axes, title in zip(grid[0], ["projection", "ground truth", *methods], strict=True):
        axes.set_title(title, fontsize=9)
    handles = [
        Swatch(color=VESSEL_COLOUR, label="vessel"),
        Swatch(color=ANEURYSM_COLOUR, label="aneurysm"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9,
        title="Maximum-intensity projections; numbers are DSC of the aneurysm", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=DPI)


def save_latents(
    path: Path, latents: Mapping[str, Float[Tensor, "n f"]], centres: Sequence[str], held_out: str
) -> None:
    """Saves the t-SNE of latents, a panel for each method, as the paper's Figure 4.

    Args:
        path: Of the PNG.
        latents: By method, of the same patches.
        centres: Of each patch.
        held_out: The centre that no method was trained on; its points are crosses.
    """
    figure = Figure(figsize=(3.3 * len(latents), 3.7), layout="constrained")
    grid = figure.subplots(1, len(latents), squeeze=False)[0]
    marks = _marks(list(dict.fromkeys(centres)), held_out)
    of = np.array(centres)
    for axes, (method, features) in zip(grid, latents.items(), strict=True):
        points = embed(features).numpy()
        for name, mark in marks.items():
            x, y = points[of == name].T
            axes.scatter(x, y, s=16 if name == held_out else 10, linewidths=1, **mark)
        apart = separation(features, centres)
        axes.set_title(f"{method}: silhouette {apart:.3f}", fontsize=9)
        axes.set(xticks=[], yticks=[])
    handles = [
        Line2D(
            [], [], linestyle="none", markersize=5,
            label=f"{name} (held out)" if name == held_out else name, **mark,
        )
        for name, mark in marks.items()
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8,
        title="t-SNE of mean latents of patches; a lower silhouette of centres means more overlap",
        title_fontsize=7.5,
    )  # fmt: skip
    figure.savefig(path, dpi=DPI)


def save_gates(path: Path, records: Mapping[str, Recorder]) -> None:
    """Saves cosine, share of aligned steps and decay over the training, a column by method.

    Args:
        path: of the PNG.
        records: by method, of steps with the objectives "source" and "target".
    """
    figure = Figure(figsize=(1.0 + 2.7 * len(records), 5.4), layout="constrained")
    grid = figure.subplots(3, len(records), squeeze=False, sharex="col", sharey="row")
    for column, (method, record) in zip(grid.T, records.items(), strict=True):
        of = record.columns()
        steps = of["step"]
        missing = np.full(len(steps), np.nan)
        gate, decay = of.get("gate", missing), of.get("decay", missing)
        # What the gate compares, where there is one.
        cosine = of.get("gate_cosine", record.cosine("source", "target"))
        column[0].set_title(method, fontsize=9)
        column[0].axhline(0, color="0.6", linewidth=0.8)
        column[0].plot(steps, cosine, ".", color=CENTRE_COLOURS[0], markersize=2.5)
        if len(steps) >= WINDOW:
            smooth = np.convolve(cosine, np.ones(WINDOW) / WINDOW, mode="valid")
            column[0].plot(steps[WINDOW - 1 :], smooth, color=CENTRE_COLOURS[3], linewidth=1.4)
        for axes, values in ((column[1], np.cumsum(gate) / steps), (column[2], decay)):
            if np.isfinite(values).all():
                axes.plot(steps, values, color=CENTRE_COLOURS[3], linewidth=1.4)
            else:
                axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="0.5")
        for axes in column:
            axes.grid(color="0.9", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        column[2].set_xlabel("iteration", fontsize=8)
    grid[0, 0].set(ylabel="cosine of source and\ntarget gradient", ylim=(-1.05, 1.05))
    grid[1, 0].set(ylabel="share of aligned\nsteps so far", ylim=(-0.03, 1.03))
    grid[2, 0].set(ylabel="decay of the teacher", ylim=(-0.03, 1.03))
    figure.savefig(path, dpi=DPI)


def separation(features: Float[Tensor, "n f"], groups: Sequence[str]) -> float:
    """The mean silhouette of groups among features: 1 far apart, 0 on top of each other.

    Rousseeuw, https://doi.org/10.1016/0377-0427(87)90125-7, on features scaled to standard
    deviation 1.

    Args:
        features: Of the points.
        groups: To which of at least two groups each point belongs.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [10.0], [10.1]])
        >>> round(separation(x, ["a", "a", "b", "b"]), 2), separation(x, ["a", "b", "a", "b"]) < 0
        (0.99, True)
    """
    scaled = StandardScaler().fit_transform(features.double().numpy())
    return float(silhouette_score(scaled, list(groups)))


def pooled_latents(
    model: torch.nn.Module, patches: Float[Tensor, "n 1 p p p"], device: torch.device
) -> Float[Tensor, "n f"]:
    """The mean over space of each patch's latent."""
    model.eval()
    with torch.no_grad():
        means = [model(chunk.to(device)).latent.mean((2, 3, 4)) for chunk in patches.split(4)]
    return torch.cat(means).cpu()


def _height(image: Float[Tensor, "1 d h w"]) -> float:
    """Height of a projection relative to its width, within what leaves room for a centre's name."""
    height, width = image[0].amax(AXIS).shape
    return min(max(height / width, 0.45), 2.0)


def _marks(names: Sequence[str], held_out: str) -> dict[str, dict[str, str]]:
    """Colour and marker of each centre: a cross if held out; beyond seven centres other markers."""
    count = len(CENTRE_COLOURS)
    return {
        name: {
            "color": CENTRE_COLOURS[k % count],
            "marker": "x" if name == held_out else MARKERS[k // count % len(MARKERS)],
        }
        for k, name in enumerate(names)
    }


def _draw(axes: Axes, picture: NDArray[np.float32]) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
