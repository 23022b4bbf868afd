import math

import pytest
import torch

from examples.common.losses import segmentation_loss


def test_loss_in_closed_form():
    target = torch.zeros(2, 2, 4, 4)
    target[:, :, :2] = 1
    # p = 1/2 everywhere: BCE log 2, Dice (2·16·0.5·1 + 1) / (32 + 32 + 1) over 64 pixels
    expected = math.log(2) + 1 - (2 * 16 + 1) / (32 + 32 + 1)
    assert segmentation_loss(torch.zeros(2, 2, 4, 4), target).item() == pytest.approx(expected)


def test_soft_dice_is_over_the_batch_not_per_image():
    logits = torch.tensor([20.0, -20.0]).reshape(2, 1, 1, 1).expand(2, 2, 4, 4)
    target = torch.ones(2, 2, 4, 4)
    bce = 20 / 2
    expected = bce + 1 - (2 * 32 + 1) / (32 + 64 + 1)
    assert segmentation_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_half_precision_logits_does_not_overflow():
    logits = torch.full((8, 2, 128, 128), 20.0, dtype=torch.float16)  # they sum to more than 65504
    assert segmentation_loss(logits, torch.ones(logits.shape)).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("space", [(4, 4), (4, 4, 4)])
def test_loss_in_any_dimensions(space):
    target = torch.zeros(2, 2, *space)
    target[:, :, :2] = 1
    half, size = target.sum().item(), target.numel()
    expected = math.log(2) + 1 - (half + 1) / (size / 2 + half + 1)
    assert segmentation_loss(torch.zeros(2, 2, *space), target).item() == pytest.approx(expected)


def test_pixels_of_weight_0_are_left_out():
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    target, weight = (noise > 0).double(), (noise.abs() > 0.5).double()
    p, t = logits.sigmoid()[weight > 0], target[weight > 0]
    entropy = -(t * p.log() + (1 - t) * (1 - p).log()).sum() / target.numel()
    dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    found = segmentation_loss(logits, target, weight=weight)
    assert found.item() == pytest.approx((entropy + 1 - dice).item(), rel=1e-6)
    assert segmentation_loss(logits, target, weight=torch.ones_like(target)).item() == (
        pytest.approx(segmentation_loss(logits, target).item(), rel=1e-6)
    )
