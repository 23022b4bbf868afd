"""Features in two dimensions by t-SNE, and how well groups are told apart in all dimensions."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def embed(
    features: Float[Tensor, "n f"], seed: int = 0, perplexity: float = 30.0
) -> Float[Tensor, "n 2"]:
    """Points in the plane whose neighbourhoods resemble those of features (t-SNE).

    Van der Maaten & Hinton, https://jmlr.org/papers/v9/vandermaaten08a.html, as in scikit-learn,
    started from principal components. Features are scaled to standard deviation 1 before.

    Args:
        features: Of at least five points.
        seed: Of what is random.
        perplexity: About the number of neighbours; at most a third of the points is used.

    Raises:
        ValueError: There are fewer points.
    """
    count = len(features)
    if count < 5:
        raise ValueError(f"there are {count} points to embed; give at least 5")
    scaled = StandardScaler().fit_transform(features.double().numpy())
    method = TSNE(perplexity=min(perplexity, (count - 1) / 3), init="pca", random_state=seed)
    return torch.from_numpy(method.fit_transform(scaled)).float()


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
