"""Batches are functions of seed and iteration; targets follow images; mixing is what it says."""

import pytest
import torch
from torch.utils.data import Dataset

from examples.common.datasets import Sample
from examples.semi.augmentation import cutmix_box, draw_grid, strengthen, warp
from examples.semi.batches import Batches
from examples.semi.data import Data

SIZE = 32


class Blobs(Dataset):
    """Images that repeat their mask, at places that depend on the index."""

    def __init__(self, count, level=1.0):
        self.count, self.level = count, level

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, SIZE)], indexing="ij")
        mask = ((y - 0.3 * (-1) ** index).hypot(x - 0.2) < 0.4).float()[None]
        return Sample(f"s/train/image/{index:02d}_0.png", self.level * (0.2 + 0.8 * mask), mask)


def make(samples=None, **options):
    labelled = Blobs(6) if samples is None else samples
    data = Data(labelled, Blobs(9, level=0.5), {}, {}, "synthetic")
    values = {
        "seed": 3, "labelled": 4, "unlabelled": 4, "strong": (0.1, 2.0), "cutmix": True,
        "amplitude": True, "iterations": 10, "size": SIZE,
    }  # fmt: skip
    return Batches(data, **values | options)


def assert_equal(a, b):
    for name in ("image", "target", "weak", "strong", "box"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_batch_depends_on_seed_and_iteration_alone():
    batches = list(make().between(0, 5))
    assert [batch.iteration for batch in batches] == list(range(5))
    torch.manual_seed(9)
    (again,) = make().between(3, 4)
    assert_equal(again, batches[3])
    assert not torch.equal(batches[2].image, batches[3].image)
    assert not torch.equal(make(seed=4).make(3).image, batches[3].image)
    assert len(list(make().between(8, 20))) == 2  # of 10 iterations


def test_labelled_images_are_the_same_for_all_methods():
    alone = make(unlabelled=0, amplitude=False).make(4)
    assert len(alone.weak) == len(alone.strong) == len(alone.box) == 0
    assert torch.equal(alone.image, make(amplitude=False).make(4).image)


class Constants(Blobs):
    def __getitem__(self, index):
        level = torch.full((1, SIZE, SIZE), float(index))
        return Sample(f"s/train/image/{index:02d}_0.png", level, level)


def test_an_image_is_drawn_twice_only_where_there_are_too_few():
    seen = set()
    for iteration in range(10):
        drawn = make(Constants(5), amplitude=False).make(iteration).image[:, 0, 0, 0].tolist()
        assert len(set(drawn)) == 4
        seen.update(drawn)
    assert seen == {0, 1, 2, 3, 4}
    few = make(Constants(3), amplitude=False).make(0).image[:, 0, 0, 0].tolist()
    assert set(few) == {0, 1, 2}


def test_targets_follow_images():
    moved = 0
    for batch in make(amplitude=False).between(0, 10):
        assert set(batch.target.unique().tolist()) == {0.0, 1.0}
        for image, target in zip(batch.image, batch.target, strict=True):
            pair = torch.stack([image.flatten(), target.flatten()])
            assert torch.corrcoef(pair)[0, 1] > 0.9
            original = torch.stack([Blobs(2)[0].target.flatten(), target.flatten()])
            moved += int(torch.corrcoef(original)[0, 1] < 0.8)
    assert moved > 10


def test_the_grid_rotates_scales_mirrors_and_bends():
    generator = torch.Generator().manual_seed(0)
    grid = draw_grid(400, 9, generator).double()
    right = grid[:, 4, 8] - grid[:, 4, 0]  # across an image, 16/9 without scaling
    down = grid[:, 8, 4] - grid[:, 0, 4]
    still = grid[:, 4, 4].abs().amax(1) < 1e-6
    assert (right * down).sum(1)[still].abs().max() < 1e-5
    mirrored = right[:, 0] < 0
    assert 0.4 < mirrored.double().mean() < 0.6
    scale = down.norm(dim=1) * 9 / 16
    assert scale.quantile(0.05) == pytest.approx(0.865, abs=0.03)
    assert scale.quantile(0.95) == pytest.approx(1.135, abs=0.03)
    angle = torch.rad2deg(torch.atan2(down[:, 0], down[:, 1]))
    assert 17 < angle.abs().quantile(0.9) < 21
    assert 0.4 < still.double().mean() < 0.6  # where nothing is bent, the middle stays


def test_beyond_the_border_images_go_on():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    outside = torch.full((1, 1, 1, 2), -3.0)
    assert warp(image, outside).item() == 0.0


def test_appearance_is_taken_over_by_and_by():
    def shift(iteration):
        plain = make(amplitude=False, iterations=1000).make(iteration).image
        mixed = make(iterations=1000).make(iteration).image
        return (mixed - plain).flatten(1).mean(1)

    assert shift(0).abs().max() < 1e-5  # degree U(0, 0)
    late = torch.cat([shift(iteration) for iteration in range(990, 999)])
    # towards images half as bright, by U(0, 1) of the difference
    assert late.max() < 0.01
    assert -0.2 < late.mean() < -0.05


def test_strong_variants():
    generator = torch.Generator().manual_seed(0)
    image = Blobs(1, level=0.5)[0].image
    variants = torch.stack([strengthen(image, (0.1, 2.0), generator) for _ in range(200)])
    assert variants.min() >= 0
    assert variants.max() < 1 + 1e-6
    means = variants.flatten(1).mean(1) / image.mean()
    assert means.min() < 0.3
    assert means.max() > 1.3
    contrast = variants.flatten(1).std(1) / image.std()
    assert contrast.min() < 0.1
    assert contrast.max() > 1.2
    same = strengthen(image, (1.0, 1.0), generator)
    assert (same - image).abs().mean() < 0.02  # blurred only


def test_cutmix_boxes():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([cutmix_box(64, generator) for _ in range(300)])[:, 0]
    areas = boxes.mean((1, 2))
    assert 0.015 < areas.min() < 0.06
    assert 0.33 < areas.max() < 0.42
    heights, widths = boxes.amax(2).sum(1), boxes.amax(1).sum(1)
    torch.testing.assert_close(heights * widths / 64**2, areas)  # they are boxes
    ratios = heights / widths
    assert ratios.min() < 0.5
    assert ratios.max() > 2
    covered = boxes.mean(0)
    assert covered.min() >= 0
    assert covered[32, 32] > covered[0, 0]
    assert (make(cutmix=False).make(1).box == 0).all()
    assert (make().make(1).box.sum((1, 2, 3)) > 0).all()
