"""Losses against references in float64, written by their formulas."""

import math

import pytest
import torch

from examples.aneurysm.losses import (
    consistency,
    contour_contrast,
    deep_supervision,
    dice_ce,
    vaseg,
)

SPACE = (4, 8, 12)


@pytest.fixture
def logits():
    return 2 * torch.randn(2, 3, *SPACE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def label():
    return torch.randint(3, (2, *SPACE), generator=torch.Generator().manual_seed(1))


def softmax(logits):
    powers = logits.double().exp()
    return powers / powers.sum(1, keepdim=True)


def slow_dice_ce(logits, label):
    p, total = softmax(logits), 0.0
    for k in (1, 2):
        y = (label == k).double()
        overlap = 2 * (p[:, k] * y).sum() + 1e-5
        total += (1 - overlap / (p[:, k].sum() + y.sum() + 1e-5)) / 2
    chosen = p.gather(1, label[:, None])
    return total - chosen.log().mean()


def test_dice_and_cross_entropy(logits, label):
    expected = float(slow_dice_ce(logits, label))
    assert float(dice_ce(logits, label)) == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_widened(logits, label):
    found = dice_ce(logits.half(), label)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(dice_ce(logits, label)), rel=1e-2)


def test_deep_supervision_leaves_the_coarsest_stage_out(logits, label):
    """Weights 1, 1/2, 0 over 3/2; coarse labels are those of the nearest voxels."""
    coarse = torch.randn(2, 3, 2, 8, 6, generator=torch.Generator().manual_seed(2))
    coarsest = torch.full((2, 3, 1, 1, 1), math.nan)
    expected = (
        slow_dice_ce(logits, label) + slow_dice_ce(coarse, label[:, 1::2, :, 1::2]) / 2
    ) / 1.5
    found = deep_supervision([logits, coarse, coarsest], label)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    alone = deep_supervision([logits], label)
    assert float(alone) == pytest.approx(float(dice_ce(logits, label)))


def test_vaseg(logits, label):
    p = softmax(logits)
    total, absolute, squared = 0.0, [], []
    for k, weight in ((1, 0.2), (2, 0.8)):
        y = (label == k).double()
        overlap = 2 * (p[:, k] * y).sum() + 1e-5
        dice = overlap / ((p[:, k] ** 2).sum() + (y**2).sum() + 1e-5)
        total += weight * (1 - dice)
        edges = []
        for z in (p[:, k], y):
            spectrum = torch.fft.fftshift(torch.fft.fftn(z, dim=(1, 2, 3)), dim=(1, 2, 3))
            low = [slice(n // 4, 3 * n // 4) for n in SPACE]
            spectrum[(slice(None), *low)] = 0
            unshifted = torch.fft.ifftshift(spectrum, dim=(1, 2, 3))
            edges.append(torch.fft.ifftn(unshifted, dim=(1, 2, 3)).abs())
        absolute.append((edges[0] - edges[1]).abs().mean())
        squared.append(((edges[0] - edges[1]) ** 2).mean())
    total += 0.6 * sum(absolute) / 2 + 0.6 * sum(squared) / 2
    assert float(vaseg(logits, label)) == pytest.approx(float(total), rel=1e-4)


def test_a_perfect_prediction_costs_vaseg_nothing(label):
    perfect = 60 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    assert float(vaseg(perfect, label)) == pytest.approx(0, abs=1e-4)


def test_consistency(logits):
    copies = [logits, logits.flip(0), logits.roll(1, 2)]
    p = torch.stack([softmax(each) for each in copies])
    expected = (p * (p / p.mean(0)).log()).mean()
    assert float(consistency(copies)) == pytest.approx(float(expected), rel=1e-4)
    assert float(consistency([logits, logits])) == pytest.approx(0, abs=1e-6)


def ball(radius=2.0):
    """A patch with a vessel, and one without."""
    grid = torch.stack(torch.meshgrid(*3 * [torch.arange(12.0)], indexing="ij"))
    inside = (grid - 6).norm(dim=0) <= radius
    return torch.stack([inside.long(), torch.zeros_like(inside, dtype=torch.long)])


def test_contours_that_agree_and_differ_from_the_background():
    """With a cosine of √½ between contours and 0 to both backgrounds: log(1 + 2·e^(−√½/τ))."""
    label = ball()
    inside = torch.nn.functional.max_pool3d((label > 0).float()[:, None], 3, 1, 1)[:, 0] > 0
    first = torch.zeros(2, 3, 12, 12, 12)
    first[:, 0][inside] = 1.0
    first[:, 1][~inside] = 5.0
    second = first.clone()
    second[:, 2][inside] = 1.0
    found = contour_contrast([first, second], label, temperature=0.5)
    assert float(found) == pytest.approx(math.log(1 + 2 * math.exp(-2 * 0.5**0.5)), rel=1e-5)


def test_contours_of_patches_without_vessels_do_not_count():
    label = torch.zeros(2, 12, 12, 12, dtype=torch.long)
    features = torch.rand(2, 4, 12, 12, 12, requires_grad=True)
    loss = contour_contrast([features, features], label)
    loss.backward()
    assert loss == 0
    assert not features.grad.any()
