"""Scores of GraTa's protocol: Dice in percent, per image and channel."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-6  # so that an empty prediction of an empty structure scores 100


def segment(logits: Float[Tensor, "*shape"], threshold: float = 0.5) -> Bool[Tensor, "*shape"]:
    """The structure is where its probability, the sigmoid of the logit, reaches `threshold`.

    Example:
        >>> segment(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [False, True, True]
    """
    return logits.sigmoid() >= threshold


def dice(
    prediction: Bool[Tensor, "*batch h w"], target: Float[Tensor, "*batch h w"]
) -> Float[Tensor, "*batch"]:
    """Dice (%) = 100·(2|P∩G| + 1e-6) / (|P| + |G| + 1e-6), over the last two dimensions.

    Computed in float64, where counts of pixels are exact.

    Raises:
        ValueError: the shapes differ (they are not broadcast).

    Example:
        >>> dice(torch.tensor([[True, False]]), torch.tensor([[1.0, 1.0]])).item()
        66.66667777777407
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction has shape {list(prediction.shape)} and the target "
            f"{list(target.shape)}; give both the same shape"
        )
    predicted, actual = prediction.double(), target.double()
    intersection = (predicted * actual).sum(dim=(-2, -1))
    size = predicted.sum(dim=(-2, -1)) + actual.sum(dim=(-2, -1))
    return 100 * (2 * intersection + EPSILON) / (size + EPSILON)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, in float64.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    return torch.tensor(values, dtype=torch.float64).mean().item()
