"""Feature vectors on a plane by t-SNE."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

# Okabe and Ito's colours, told apart by colour-blind readers, https://jfly.uni-koeln.de/color/
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442")
MARKERS = "osD^vP*X"


def embed(features: Float[Tensor, "n d"], seed: int = 0) -> Float[Tensor, "n 2"]:
    """Places vectors on a plane so that neighbours stay neighbours.

    t-SNE (van der Maaten and Hinton, https://www.jmlr.org/papers/v9/vandermaaten08a.html) as
    scikit-learn has it, on standardised features, with a perplexity of 30 or a third of the number
    of vectors. Distances between clusters, and their sizes, mean nothing.

    Args:
        features: at least four vectors.
        seed: of the method.

    Raises:
        ValueError: there are fewer than four.
    """
    count = len(features)
    if count < 4:
        raise ValueError(f"there are {count} vectors to place; give at least 4")
    values = features.double()
    values = (values - values.mean(0)) / values.std(0, correction=0).clamp(min=1e-12)
    method = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed)
    placed: np.ndarray = method.fit_transform(values.numpy())
    return torch.from_numpy(placed)


def save_tsne(
    path: Path,
    panels: Mapping[str, tuple[Float[Tensor, "n d"], Sequence[str]]],
    note: str,
    seed: int = 0,
) -> None:
    """Saves a scatter plot for each set of features, with a colour and a marker for each group.

    Args:
        path: of the PNG.
        panels: by title, vectors and the group that each of them belongs to.
        note: what the points are, below the plot.
        seed: of t-SNE.
    """
    figure = Figure(figsize=(3.6 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (features, groups)) in zip(grid, panels.items(), strict=True):
        places = embed(features, seed).numpy()
        for number, group in enumerate(dict.fromkeys(groups)):
            chosen = np.array([other == group for other in groups])
            axes.scatter(
                *places[chosen].T, s=16, alpha=0.8, linewidths=0, label=group,
                color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
            )  # fmt: skip
        axes.set(title=title, xticks=[], yticks=[])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False,
        fontsize=8, title=note, title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
