"""Losses of the methods on logits of background, vessel and aneurysm; all compute in float32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from monai.losses import DiceLoss
from torch import Tensor

import gradkit as gk

CLASSES = 3
SMOOTH = 1e-5

_DICE = DiceLoss(
    include_background=False, to_onehot_y=True, softmax=True, batch=True,
    smooth_nr=SMOOTH, smooth_dr=SMOOTH,
)  # fmt: skip


def dice_ce(logits: Float[Tensor, "n 3 ..."], label: Int[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Cross-entropy plus the soft Dice loss of vessel and aneurysm, over the whole batch (DCE).

    Example:
        >>> label = torch.tensor([[0, 1, 2]])
        >>> logits = 50 * F.one_hot(label, 3).movedim(-1, 1).float()
        >>> round(dice_ce(logits, label).item(), 4)
        0.0
    """
    logits = logits.float()
    dice: Tensor = _DICE(logits, label[:, None])
    return F.cross_entropy(logits, label) + dice


def deep_supervision(
    logits: Sequence[Float[Tensor, "n 3 ..."]], label: Int[Tensor, "n d h w"]
) -> Float[Tensor, ""]:
    """`dice_ce` of decoder stages from fine to coarse, as nnU-Net weighs them.

    Isensee et al., https://doi.org/10.1038/s41592-020-01008-z: the weights are 1, 1/2, 1/4, … with
    the last one 0, scaled to the sum 1; labels are taken at the nearest voxel.
    """
    weights = [2.0**-stage for stage in range(len(logits))]
    if len(weights) > 1:
        weights[-1] = 0.0
    total = torch.zeros((), device=label.device)
    for weight, stage in zip(weights, logits, strict=True):
        if weight > 0:
            space = stage.shape[2:]
            coarse = F.interpolate(label[:, None].float(), space, mode="nearest-exact")[:, 0]
            total = total + weight / sum(weights) * dice_ce(stage, coarse.long())
    return total


def vaseg(logits: Float[Tensor, "n 3 d h w"], label: Int[Tensor, "n d h w"]) -> Float[Tensor, ""]:
    """The loss of VASeg, the authors' earlier network for vessels and aneurysms.

    Lin et al., https://doi.org/10.1016/j.cmpb.2023.107355:

        0.2·(1 − Dice_vessel) + 0.8·(1 − Dice_aneurysm) + 0.6·MAE + 0.6·MSE

    with squared denominators in Dice; MAE and MSE compare the magnitudes of the high frequencies of
    probabilities and label. Reconstructed: the high-pass filter is that of GS-EMA's code (half of
    each axis removed round the lowest frequency, then the inverse transform's absolute value), on
    the channels of vessel and aneurysm.
    """
    p = logits.float().softmax(1)[:, 1:]
    y = F.one_hot(label, CLASSES).movedim(-1, 1)[:, 1:].float()
    space = (0, *range(2, p.ndim))
    overlap = 2 * (p * y).sum(space) + SMOOTH
    dice = overlap / (p.square().sum(space) + y.square().sum(space) + SMOOTH)
    edges, true_edges = (gk.losses.high_pass(z, symmetric=False, inverse="abs") for z in (p, y))
    weights = torch.tensor([0.2, 0.8], device=p.device)
    boundary = F.l1_loss(edges, true_edges) + F.mse_loss(edges, true_edges)
    return (weights * (1 - dice)).sum() + 0.6 * boundary


def consistency(logits: Sequence[Float[Tensor, "n 3 ..."]]) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of several predictions from their mean, over all elements (CMDG).

    Ouyang et al., https://arxiv.org/abs/2111.12525, whose code divides by the number of classes,
    too. That the reference is the mean of the copies is reconstructed.
    """
    logs = torch.stack([each.float().log_softmax(1) for each in logits])
    mean = logs.exp().mean(0, keepdim=True).clamp(min=1e-8).log()
    return (logs.exp() * (logs - mean)).mean()


def contour_contrast(
    features: Sequence[Float[Tensor, "n f d h w"]],
    label: Int[Tensor, "n d h w"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Draws features of contours together and away from those of the background round them (FedDG).

    After Liu et al., https://arxiv.org/abs/2103.06030: for each patch and view the mean feature in
    a shell on the surface of vessels and aneurysms, and that in a shell outside; each pair of
    surfaces is a positive pair of InfoNCE, each surface and background a negative one. The shells
    (one voxel to each side; two to three voxels outside) and the temperature are reconstructed.

    Args:
        features: Of the views, which share the label.
        label: Patches without vessels do not count.
        temperature: Of the cosines.

    Returns:
        The mean over pairs; 0 where there are none.
    """
    inside = (label > 0).float()[:, None]
    near, far = _dilated(inside, 1), _dilated(inside, 3)
    surface = near - (1 - _dilated(1 - inside, 1))
    outside = far - near
    there = (surface.sum((1, 2, 3, 4)) > 0) & (outside.sum((1, 2, 3, 4)) > 0)
    on, off = (
        torch.cat([_pooled(view.float(), shell)[there] for view in features])
        for shell in (surface, outside)
    )
    if len(on) < 2:
        return features[0].sum() * 0.0
    positive = on @ on.T / temperature
    negative = (on @ off.T / temperature).logsumexp(1, keepdim=True)
    loss = torch.logaddexp(positive, negative.expand_as(positive)) - positive
    pairs = ~torch.eye(len(on), dtype=torch.bool, device=on.device)
    return loss[pairs].mean()


def _dilated(mask: Float[Tensor, "n 1 d h w"], voxels: int) -> Float[Tensor, "n 1 d h w"]:
    return F.max_pool3d(mask, 2 * voxels + 1, stride=1, padding=voxels)


def _pooled(
    features: Float[Tensor, "n f d h w"], mask: Float[Tensor, "n 1 d h w"]
) -> Float[Tensor, "n f"]:
    """The mean feature in a mask, of norm 1."""
    total = (features * mask).sum((2, 3, 4)) / mask.sum((2, 3, 4)).clamp(min=1)
    return F.normalize(total, dim=1)
