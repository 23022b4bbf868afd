"""Figures of a comparison: curves of validation, contours of predictions, features on a plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.contours import DPI, save_contours, spread
from examples.common.datasets import Sample, length
from examples.common.metrics import segment, surface_scores_of
from examples.common.training import Entry
from examples.common.tsne import COLOURS, save_tsne
from examples.semi.network import UNet
from examples.semi.task import Task

LINES = ("solid", "dashed", "dashdot", "dotted")


def save_curves(
    path: Path,
    histories: Mapping[str, Sequence[Sequence[Entry]]],
    sites: Sequence[str],
    labelled: str,
    every: int,
) -> None:
    """Saves loss and Dice on held-out images by iteration: a column for each site.

    Args:
        path: of the PNG.
        histories: by method, the history of each seed's training; the mean over seeds is drawn, as
            far as all of them go.
        sites: that have held-out images.
        labelled: the site with labels, for the title.
        every: iterations between two validations.
    """
    figure = Figure(figsize=(1.2 + 2.3 * len(sites), 4.6), layout="constrained")
    grid = figure.subplots(2, len(sites), squeeze=False, sharex=True, sharey="row")
    for site, column in zip(sites, grid.T, strict=True):
        column[0].set_title(f"{site} (labelled)" if site == labelled else site, fontsize=10)
        for axes, name in zip(column, ("loss", "dice"), strict=True):
            for number, (method, runs) in enumerate(histories.items()):
                shared = min(map(len, runs))
                values = [[entry[f"{name}_{site}"] for entry in run[:shared]] for run in runs]
                axes.plot(
                    every * np.arange(1, shared + 1), np.mean(values, axis=0),
                    color=COLOURS[number % len(COLOURS)], linestyle=LINES[number % len(LINES)],
                    linewidth=1.4, label=method,
                )  # fmt: skip
            axes.grid(color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel("iteration")
    grid[0, 0].set_ylabel("validation loss")
    grid[1, 0].set(ylabel="validation Dice (%)", ylim=(-2, 102))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=DPI)


@torch.no_grad()
def save_predictions(
    path: Path,
    task: Task,
    models: Mapping[str, UNet],
    test: Mapping[str, Dataset[Sample]],
    device: torch.device,
) -> None:
    """Saves a test image of each site with the contours that each method's model predicts.

    Args:
        path: of the PNG.
        task: for structures and colours.
        models: by method, in evaluation mode.
        test: by site.
        device: where the models are.
    """
    score = surface_scores_of(task.structures)
    rows = []
    for site, samples in test.items():
        sample = samples[spread(1, length(samples))[0]]
        image = sample.image[None].to(device)
        predictions = {}
        for method, model in models.items():
            prediction = segment(model(image)[0].float().cpu())
            scores = score(prediction, sample.target)
            text = f"Dice {scores['dice']:.1f}%, HD95 {scores['hd95']:.1f}"
            predictions[method] = prediction, text
        rows.append((site, sample, predictions))
    note = "The image is the middle one of each site's test list, whatever its scores."
    save_contours(path, rows, task.outlines, "image", note)


@torch.no_grad()
def structure_features(
    model: UNet, samples: Dataset[Sample], device: torch.device, most: int = 40
) -> Float[Tensor, "n width"]:
    """The last decoder features of images, averaged with the predicted probability as weight.

    Args:
        model: in evaluation mode.
        samples: of which at most `most` are used, evenly spread.
        device: where the model is.
        most: number of images.
    """
    rows = []
    for index in spread(most, length(samples)):
        found = model.segment(samples[index].image[None].to(device))
        p = found.logits.float().sigmoid().amax(1, keepdim=True)
        rows.append(((p * found.features.float()).sum((0, 2, 3)) / p.sum()).cpu())
    return torch.stack(rows)


def save_features(
    path: Path,
    models: Mapping[str, UNet],
    test: Mapping[str, Dataset[Sample]],
    device: torch.device,
) -> None:
    """Saves where t-SNE places the features of test images, by method and coloured by site."""
    panels = {}
    for method, model in models.items():
        features = {site: structure_features(model, each, device) for site, each in test.items()}
        groups = [site for site, rows in features.items() for _ in rows]
        panels[method] = torch.cat(list(features.values())), groups
    save_tsne(path, panels, "Last decoder features of test images, averaged over the prediction.")
