"""Dice equals an independent reference in two and three dimensions."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from examples.common.metrics import OVERLAPS, dice, dice_of, overlaps, segment, surface_scores_of


def test_dice_in_closed_form():
    target = torch.zeros(1, 4, 4, 4)
    target[0, :3, :2] = 1  # half of the image; the last channel is empty
    prediction = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    prediction[0, 0, :2] = True  # all of it
    prediction[0, 1, 1:3] = True  # half of it, and as much outside
    expected = [100.0, 100 * (8 + 1e-6) / (16 + 1e-6), 100 * 1e-6 / (8 + 1e-6), 100.0]
    torch.testing.assert_close(
        dice(prediction, target, 2)[0],
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


def test_dice_does_not_broadcast():
    with pytest.raises(ValueError, match="same shape"):
        dice(torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4), 2)


def test_a_probability_of_one_half_is_foreground():
    assert segment(torch.tensor([0.0, -1e-3])).tolist() == [True, False]


@pytest.mark.parametrize("space", [(9, 7), (9, 7, 5)])
def test_dice_equals_monais(space):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.rand(6, 3, *space, generator=generator) > 0.6 for _ in range(2))
    found = dice(prediction, target.float(), len(space))
    assert found.shape == (6, 3)
    torch.testing.assert_close(found.float(), 100 * compute_dice(prediction, target))


@pytest.mark.parametrize("space", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_dice_counts_common_places(space):
    generator = torch.Generator().manual_seed(1)
    prediction, target = (torch.rand(space, generator=generator) > 0.5 for _ in range(2))
    p, g = (set(map(tuple, mask.nonzero().tolist())) for mask in (prediction, target))
    expected = 100 * 2 * len(p & g) / (len(p) + len(g))
    assert dice(prediction, target.float(), len(space)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dimensions", [0, 3])
def test_dice_needs_as_many_dimensions(dimensions):
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"dimensions is {dimensions}; choose from 1 to 2"):
        dice(mask, mask.float(), dimensions)


@pytest.mark.parametrize("space", [(4, 4), (4, 4, 4)])
def test_dice_by_name_is_in_the_order_of_the_channels(space):
    target = torch.zeros(2, *space)
    target[0, :2] = 1
    prediction = torch.zeros(2, *space, dtype=torch.bool)
    prediction[0, 1:3] = True
    score = dice_of(["vessel", "aneurysm"])(prediction, target)
    assert list(score) == ["vessel", "aneurysm"]
    assert score["vessel"] == pytest.approx(50, rel=1e-6)
    assert score["aneurysm"] == 100  # empty, and empty it is predicted
    with pytest.raises(ValueError, match="zip"):
        dice_of(["vessel"])(prediction, target)


def surface(mask):
    """Pixels of a mask with a neighbour, straight, that is not in it."""
    outside = torch.nn.functional.pad(~mask, (1, 1, 1, 1), value=True)
    near = outside[2:, 1:-1] | outside[:-2, 1:-1] | outside[1:-1, 2:] | outside[1:-1, :-2]
    return (mask & near).nonzero().double()


def test_surface_scores_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    for _ in range(5):
        masks = []
        for _ in range(2):
            a, b, r, s = (float(value) for value in torch.rand(4, generator=generator))
            inside = ((y - 9 - 6 * a) / (3 + 4 * r)) ** 2 + ((x - 9 - 6 * b) / (3 + 4 * s)) ** 2
            masks.append(inside <= 1)
        prediction, target = masks
        distances = torch.cdist(surface(prediction), surface(target))
        there, back = distances.amin(1), distances.amin(0)
        both = (prediction & target).sum().item()
        scores = surface_scores_of(["gland"])(prediction[None], target[None].float())
        assert scores["jaccard"] == pytest.approx(100 * both / (prediction | target).sum().item())
        size = (prediction.sum() + target.sum()).item()
        assert scores["dice"] == pytest.approx(200 * both / size, rel=1e-6)
        quantiles = (np.percentile(each, 95) for each in (there, back))
        assert scores["hd95"] == pytest.approx(max(quantiles), rel=1e-5)
        assert scores["asd"] == pytest.approx(torch.cat([there, back]).mean().item(), rel=1e-5)


def test_surface_scores_of_empty_masks_and_of_two_structures():
    empty, full = torch.zeros(6, 8), torch.ones(6, 8)
    score = surface_scores_of(["disc", "cup"])
    scores = score(torch.stack([empty, empty]) > 0, torch.stack([full, empty]))
    assert scores == {
        "dice": 50.0, "jaccard": 50.0, "hd95": 5.0, "asd": 5.0,
        "disc_dice": 0.0, "disc_jaccard": 0.0, "disc_hd95": 10.0, "disc_asd": 10.0,
        "cup_dice": 100.0, "cup_jaccard": 100.0, "cup_hd95": 0.0, "cup_asd": 0.0,
    }  # fmt: skip
    assert score(torch.stack([full, empty]) > 0, torch.stack([empty, full]))["asd"] == 10.0


def test_overlaps_by_their_definitions():
    """Sets of voxels, and volume similarity as 1 − |V_P − V_G| / (V_P + V_G)."""
    generator = torch.Generator().manual_seed(1)
    prediction, target = (torch.rand(5, 6, 7, generator=generator) > p for p in (0.7, 0.4))
    p, g = ({tuple(voxel) for voxel in mask.nonzero().tolist()} for mask in (prediction, target))
    expected = {
        "dsc": 2 * len(p & g) / (len(p) + len(g)),
        "sen": len(p & g) / len(g),
        "jac": len(p & g) / len(p | g),
        "vs": 1 - abs(len(p) - len(g)) / (len(p) + len(g)),
    }
    found = overlaps(prediction, target.float())
    assert list(found) == list(OVERLAPS)
    assert found == pytest.approx({name: 100 * value for name, value in expected.items()})


@pytest.mark.parametrize(
    ("prediction", "target", "score"), [(0, 0, 100.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 100.0)]
)
def test_overlaps_of_empty_masks(prediction, target, score):
    masks = torch.full((2, 3), bool(prediction)), torch.full((2, 3), float(target))
    assert set(overlaps(*masks).values()) == {score}


def test_disjoint_masks_of_one_size_have_volume_similarity_only():
    found = overlaps(torch.tensor([True, False]), torch.tensor([0.0, 1.0]))
    assert found == {"dsc": 0, "sen": 0, "jac": 0, "vs": 100}


def test_overlaps_do_not_broadcast():
    with pytest.raises(ValueError, match="same shape"):
        overlaps(torch.ones(4, dtype=torch.bool), torch.ones(1, 4))
