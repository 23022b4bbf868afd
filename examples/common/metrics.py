"""Scores of segmentations: overlaps in percent and distances in pixels, N-dimensional."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_iou,
)
from torch import Tensor

EPSILON = 1e-6  # so that an empty prediction of an empty structure scores 100

Scorer: TypeAlias = Callable[[Tensor, Tensor], dict[str, float]]
"""Scores of one case by name, from its prediction and its target [structures, *space]."""


def segment(logits: Float[Tensor, "*shape"], threshold: float = 0.5) -> Bool[Tensor, "*shape"]:
    """The structure is where its probability, the sigmoid of the logit, reaches `threshold`.

    Example:
        >>> segment(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [False, True, True]
    """
    return logits.sigmoid() >= threshold


def dice(
    prediction: Bool[Tensor, "*shape"], target: Float[Tensor, "*shape"], dimensions: int
) -> Float[Tensor, "*batch"]:
    """Dice (%) = 100·(2|P∩G| + 1e-6) / (|P| + |G| + 1e-6), over the last dimensions.

    Computed in float64, where counts of pixels are exact.

    Args:
        prediction: of one structure in each of the leading dimensions.
        target: 0 or 1, of the same shape.
        dimensions: number of spatial dimensions, which come last: 2 for images, 3 for volumes.

    Raises:
        ValueError: the shapes differ (they are not broadcast), or have fewer dimensions.

    Example:
        >>> dice(torch.tensor([[True, False]]), torch.tensor([[1.0, 1.0]]), dimensions=2).item()
        66.66667777777407
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction has shape {list(prediction.shape)} and the target "
            f"{list(target.shape)}; give both the same shape"
        )
    if not 1 <= dimensions <= prediction.ndim:
        raise ValueError(
            f"dimensions is {dimensions}; choose from 1 to {prediction.ndim}, as many as the "
            "prediction has"
        )
    space = tuple(range(-dimensions, 0))
    predicted, actual = prediction.double(), target.double()
    intersection = (predicted * actual).sum(dim=space)
    size = predicted.sum(dim=space) + actual.sum(dim=space)
    return 100 * (2 * intersection + EPSILON) / (size + EPSILON)


def dice_of(structures: Sequence[str]) -> Scorer:
    """The Dice (%) of each of these structures, which are the channels of prediction and target.

    Example:
        >>> score = dice_of(["vessel", "aneurysm"])
        >>> score(torch.ones(2, 4, 4, 4, dtype=torch.bool), torch.ones(2, 4, 4, 4))
        {'vessel': 100.0, 'aneurysm': 100.0}
    """

    def score(
        prediction: Bool[Tensor, "structures ..."], target: Float[Tensor, "structures ..."]
    ) -> dict[str, float]:
        values = dice(prediction, target, prediction.ndim - 1).tolist()
        return dict(zip(structures, values, strict=True))

    return score


SURFACE_SCORES = ("dice", "jaccard", "hd95", "asd")


def surface_scores_of(structures: Sequence[str]) -> Scorer:
    """Dice and Jaccard (%), 95% Hausdorff and average symmetric surface distance (pixels).

    Jaccard and distances are MONAI's. The 95% Hausdorff distance is the larger of the two directed
    95th percentiles, and the average distance is taken over the surfaces of both. Of an empty mask
    there is no distance, hence this rule: where prediction and target are both empty, overlaps are
    100 and distances 0; where one of them is, overlaps are 0 and distances the image's diagonal.

    Args:
        structures: names of the channels. Of several, the scores are the means over them, followed
            by each one's own, as `disc_dice`.

    Example:
        >>> target = torch.zeros(1, 8, 8)
        >>> target[0, 2:6, 2:6] = 1
        >>> score = surface_scores_of(["gland"])
        >>> {name: round(value, 2) for name, value in score(target.roll(1, 1) > 0, target).items()}
        {'dice': 75.0, 'jaccard': 60.0, 'hd95': 1.0, 'asd': 0.5}
        >>> {name: round(value, 2) for name, value in score(target > 1, target).items()}
        {'dice': 0.0, 'jaccard': 0.0, 'hd95': 11.31, 'asd': 11.31}
    """

    def score(
        prediction: Bool[Tensor, "structures ..."], target: Float[Tensor, "structures ..."]
    ) -> dict[str, float]:
        each = [
            _surface_scores(predicted, actual > 0.5)
            for predicted, actual in zip(prediction, target, strict=True)
        ]
        scores = {name: mean([own[name] for own in each]) for name in SURFACE_SCORES}
        if len(structures) > 1:
            for structure, own in zip(structures, each, strict=True):
                scores |= {f"{structure}_{name}": value for name, value in own.items()}
        return scores

    return score


def _surface_scores(
    prediction: Bool[Tensor, "*space"], target: Bool[Tensor, "*space"]
) -> dict[str, float]:
    """The `SURFACE_SCORES` of one structure; see `surface_scores_of` for empty masks."""
    found, there = bool(prediction.any()), bool(target.any())
    if not (found and there):
        right = found == there
        overlap, distance = (100.0, 0.0) if right else (0.0, math.hypot(*target.shape))
        return {"dice": overlap, "jaccard": overlap, "hd95": distance, "asd": distance}
    overlap = float(dice(prediction, target.double(), target.ndim))
    pair = prediction[None, None].float(), target[None, None].float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI of its own arguments
        distances = (
            compute_hausdorff_distance(*pair, include_background=True, percentile=95),
            compute_average_surface_distance(*pair, include_background=True, symmetric=True),
        )
    jaccard = 100 * compute_iou(*pair, include_background=True).item()
    hd95, asd = (distance.item() for distance in distances)
    return {"dice": overlap, "jaccard": jaccard, "hd95": hd95, "asd": asd}


OVERLAPS = ("dsc", "sen", "jac", "vs")
"""Names of the scores of `overlaps`."""


def overlaps(
    prediction: Bool[Tensor, "*space"], target: Float[Tensor, "*space"]
) -> dict[str, float]:
    """Dice, sensitivity, Jaccard index and volume similarity (%) of one structure of one case.

    From counts of voxels: TP in both, FP in the prediction only, FN in the target only:

        dsc = 2·TP / (2·TP + FP + FN)        sen = TP / (TP + FN)
        jac = TP / (TP + FP + FN)            vs = 1 − |FN − FP| / (2·TP + FP + FN)

    Where both are empty all are 100; where one of them is empty all are 0.

    Raises:
        ValueError: the shapes differ (they are not broadcast).

    Example:
        >>> overlaps(torch.tensor([True, True, False]), torch.tensor([1.0, 0.0, 0.0]))["vs"]
        66.66666666666667
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction has shape {list(prediction.shape)} and the target "
            f"{list(target.shape)}; give both the same shape"
        )
    actual = target > 0.5
    tp = int((prediction & actual).sum())
    fp, fn = int(prediction.sum()) - tp, int(actual.sum()) - tp
    if tp + fp == 0 or tp + fn == 0:
        return dict.fromkeys(OVERLAPS, 100.0 if fp + fn == 0 else 0.0)
    size = 2 * tp + fp + fn
    values = (2 * tp / size, tp / (tp + fn), tp / (tp + fp + fn), 1 - abs(fn - fp) / size)
    return {name: 100 * value for name, value in zip(OVERLAPS, values, strict=True)}


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, in float64.

    Example:
        >>> mean([1.0, 2.0])
        1.5
    """
    return torch.tensor(values, dtype=torch.float64).mean().item()
