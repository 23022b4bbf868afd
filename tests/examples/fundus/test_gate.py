"""The gate's cues and weights, beside references in numpy and values that are known."""

import math

import numpy as np
import pytest
import torch

from examples.common.datasets import Sample
from examples.fundus.gate import CupGate, CupRatio, cues, cup_ratio, measure_cup_ratio, roundness

RATIO = CupRatio(0.3, 0.1)


def ellipse(size, centre, axes, angle=0.0):
    rows, columns = np.mgrid[:size, :size].astype(float)
    y, x = rows - centre[0], columns - centre[1]
    along = y * math.cos(angle) + x * math.sin(angle)
    across = x * math.cos(angle) - y * math.sin(angle)
    return torch.from_numpy((along / axes[0]) ** 2 + (across / axes[1]) ** 2 <= 1)


def reference_roundness(mask):
    """Pixel by pixel, by the inverse of the covariance."""
    points = np.argwhere(mask.numpy()).astype(float)
    if len(points) < 20:
        return 0.0
    centre, covariance = points.mean(0), np.cov(points.T, bias=True)
    inverse = np.linalg.inv(covariance)
    shared = either = 0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            offset = np.array([row, column]) - centre
            inside = offset @ inverse @ offset <= 4
            shared += bool(mask[row, column]) and inside
            either += bool(mask[row, column]) or inside
    return shared / either


def reference_weight(candidates, ratio):
    """w of one image [2, 2, H, W], by the rule's formula."""
    masks = candidates.numpy() >= 0.5
    rho = [mask[1].sum() / (mask[0].sum() + 16) for mask in masks]
    e = [reference_roundness(torch.from_numpy(mask[1])) for mask in masks]
    dz = (abs(rho[1] - ratio.mean) - abs(rho[0] - ratio.mean)) / ratio.deviation
    return 1 / (1 + math.exp(-(30 * (e[1] - e[0]) + 4.5 * dz + 0.25)))


def blobs(count, size=24):
    """Smooth random shapes, no two alike."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64)
    return torch.nn.functional.avg_pool2d(noise, 7, 1, 3)[:, 0] > 0.05


def test_roundness_equals_a_reference():
    masks = torch.stack([*blobs(3), ellipse(24, (9, 12), (8, 4), 0.5), torch.ones(24, 24) > 0])
    found = roundness(masks)
    expected = torch.tensor([reference_roundness(mask) for mask in masks], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert found[:3].max() < 0.8 < 0.95 < found[3]
    assert torch.equal(roundness(masks.reshape(5, 1, 24, 24))[:, 0], found)


def test_roundness_of_shapes_that_are_known():
    """Of a square with the circle of radius side/√3: 0.8266 by the area of the segments."""
    r = 1 / math.sqrt(3)
    segments = 4 * (r**2 * math.acos(0.5 / r) - 0.5 * math.sqrt(r**2 - 0.25))
    shared = math.pi * r**2 - segments
    square = torch.zeros(100, 100, dtype=torch.bool)
    square[10:90, 10:90] = True
    assert roundness(square).item() == pytest.approx(
        shared / (1 + math.pi * r**2 - shared), abs=0.01
    )
    for angle in (0.0, 0.7):
        assert roundness(ellipse(100, (50, 45), (40, 20), angle)) > 0.97


def test_what_has_no_shape_is_not_round():
    masks = torch.zeros(4, 40, 40, dtype=torch.bool)
    masks[1, 3, :] = True  # a line
    masks[2].fill_diagonal_(True)
    masks[3, :4, :5] = True
    assert roundness(masks)[:3].tolist() == [0, 0, 0]
    assert roundness(masks)[3] > 0.8  # 20 pixels
    masks[3, 0, 0] = False
    assert roundness(masks)[3] == 0


def test_the_ratio_of_labels():
    def sample(disc, cup):
        target = torch.zeros(2, 16, 16)
        target[0].view(-1)[:disc] = 1
        target[1].view(-1)[:cup] = 1
        return Sample("a", torch.zeros(3, 16, 16), target)

    samples = [sample(84, 20), sample(84, 50), sample(0, 0)]
    found = measure_cup_ratio(samples)
    assert found.mean == pytest.approx((0.2 + 0.5 + 0) / 3)
    assert found.deviation == pytest.approx(np.std([0.2, 0.5, 0]))
    assert cup_ratio(samples[0].target > 0.5) == pytest.approx(0.2)


def test_weights_equal_a_reference_for_each_image_of_a_batch():
    shapes = blobs(8).reshape(2, 2, 2, 24, 24)
    shapes[:, :, 0] |= shapes[:, :, 1]  # the disc holds the cup
    candidates = torch.where(shapes, 0.8, 0.3)
    weights = CupGate(RATIO)(candidates)
    assert weights.shape == (2, 2, 2)
    expected = [reference_weight(candidates[:, image], RATIO) for image in range(2)]
    assert abs(expected[0] - expected[1]) > 0.1
    torch.testing.assert_close(weights[1, :, 1], torch.tensor(expected))
    torch.testing.assert_close(weights[0, :, 1], 1 - torch.tensor(expected))
    assert weights[:, :, 0].tolist() == [[0, 0], [1, 1]]


def test_the_rounder_and_the_farther_cup_wins():
    """Each cue alone, in both directions; without any, sigmoid(0.25)."""
    disc = ellipse(64, (32, 32), (28, 28))
    small, large = ellipse(64, (32, 32), (9, 9)), ellipse(64, (32, 32), (23, 23))
    ragged = small.clone()
    ragged[:, 32:] = False

    def weigh(first, second, **constants):
        cups = torch.stack([first, second])
        candidates = torch.stack([disc.expand(2, 64, 64), cups], dim=1).float().unsqueeze(1)
        rounder, farther = cues(candidates, CupRatio(0.1, 0.1))
        w = CupGate(CupRatio(0.1, 0.1), **constants)(candidates)[1, 0, 1].item()
        return w, rounder.item(), farther.item()

    w, rounder, farther = weigh(ragged, small, farther=0.0)
    assert rounder > 0.1
    assert w > 0.9
    assert weigh(small, ragged, farther=0.0)[0] < 0.1
    w, rounder, farther = weigh(small, large, rounder=0.0)
    assert farther > 1  # the small one has the source's ratio
    assert w > 0.9
    assert weigh(large, small, rounder=0.0)[0] < 0.1
    assert weigh(small, small)[0] == pytest.approx(1 / (1 + math.exp(-0.25)))


def test_labels_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match=r"0\.3 in all labels of the source"):
        CupGate(CupRatio(0.3, 0.0))
