"""Losses of segmentations, in any number of spatial dimensions."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def segmentation_loss(
    logits: Float[Tensor, "n c ..."], target: Float[Tensor, "n c ..."], smooth: float = 1.0
) -> Float[Tensor, ""]:
    """Binary cross-entropy (mean) plus soft Dice loss, both over the whole batch and all channels.

    Dice is 1 − (2Σpt + smooth) / (Σp + Σt + smooth) with p the sigmoid of the logits.

    Example:
        >>> import torch
        >>> target = torch.ones(1, 2, 4, 4)
        >>> round(segmentation_loss(100 * target, target).item(), 6)
        0.0
    """
    logits = logits.float()  # a sum over the batch overflows half precision
    p = logits.sigmoid()
    overlap = (2 * (p * target).sum() + smooth) / (p.sum() + target.sum() + smooth)
    return F.binary_cross_entropy_with_logits(logits, target) + 1 - overlap
