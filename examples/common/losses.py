"""Losses of segmentations, in any number of spatial dimensions."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def segmentation_loss(
    logits: Float[Tensor, "n c ..."],
    target: Float[Tensor, "n c ..."],
    smooth: float = 1.0,
    weight: Float[Tensor, "n c ..."] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy (mean) plus soft Dice loss, both over the whole batch and all channels.

    Dice is 1 − (2Σpt + smooth) / (Σp + Σt + smooth) with p the sigmoid of the logits.

    Args:
        logits: of each structure.
        target: from 0 to 1.
        smooth: keeps the Dice loss of an empty structure finite.
        weight: of each pixel, from 0 (left out) to 1. The cross-entropy is still divided by the
            number of all pixels, so that few pixels that count make a small loss.

    Example:
        >>> import torch
        >>> target = torch.ones(1, 2, 4, 4)
        >>> round(segmentation_loss(100 * target, target).item(), 6)
        0.0
    """
    logits = logits.float()  # a sum over the batch overflows half precision
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight)
    p = logits.sigmoid()
    counted = target
    if weight is not None:
        p, counted = weight * p, weight * target
    overlap = (2 * (p * target).sum() + smooth) / (p.sum() + counted.sum() + smooth)
    return entropy + 1 - overlap
