"""Patches: where they come from, and that they depend on seed, rank, epoch and index alone."""

import torch

from examples.aneurysm.patches import PatchDataset
from examples.common.datasets import Sample


def sample(value, shape=(20, 20, 20)):
    """A volume of one value, with one voxel of an aneurysm that is 100 brighter."""
    image = torch.full((1, *shape), float(value))
    target = torch.zeros(2, *shape)
    target[1, 10, 12, 9] = 1
    image[0, 10, 12, 9] += 100
    return Sample(f"{value}", image, target)


CENTRES = [[sample(0), sample(1)], [sample(2)], [sample(3)]]


def views(image, other, rng):
    return {"source": image, "other": other(), "draw": torch.tensor(rng.random())}


def dataset(foreground=0.5, seed=0, rank=0, centres=CENTRES, side=16, count=64):
    return PatchDataset(centres, side, count, foreground, views, seed, rank)


def test_image_and_label_stay_together_and_centres_weigh_the_same():
    drawn = [dataset(0.0)[index] for index in range(60)]
    values = torch.tensor([float(patch["source"].median().round()) for patch in drawn])
    for value, share in ((0, 1 / 6), (1, 1 / 6), (2, 1 / 3), (3, 1 / 3)):
        assert abs((values == value).float().mean() - share) < 0.2
    for patch in drawn:
        assert patch["source"].shape == patch["other"].shape == (1, 16, 16, 16)
        assert patch["label"].shape == (16, 16, 16)
        bright = patch["source"][0] > 60
        assert (patch["label"][bright] == 2).all()


def test_the_other_patch_is_of_another_centre():
    for index in range(20):
        patch = dataset()[index]
        mine, other = (float(patch[name].median().round()) for name in ("source", "other"))
        assert {mine, other} not in ({0.0}, {1.0}, {0.0, 1.0}, {2.0}, {3.0})


def test_patches_round_aneurysms():
    everywhere = [(dataset(1.0)[index]["label"] == 2).any() for index in range(20)]
    anywhere = [(dataset(0.0, side=8)[index]["label"] == 2).any() for index in range(20)]
    # Rotation may take a single voxel away.
    assert sum(everywhere) >= 16
    assert sum(anywhere) <= 10


def test_what_a_patch_depends_on():
    def draw(index=3, epoch=0, **options):
        patches = dataset(**options)
        patches.epoch = epoch
        return float(patches[index]["draw"])

    assert draw() == draw()
    different = {draw(), draw(index=4), draw(epoch=1), draw(seed=1), draw(rank=1)}
    assert len(different) == 5


def test_small_volumes_are_padded_and_lone_centres_are_their_own_other():
    alone = dataset(centres=[[sample(1, (12, 18, 20))]])
    patch = alone[0]
    assert patch["source"].shape == patch["other"].shape == (1, 16, 16, 16)
    assert patch["source"].median() == 1


def test_volumes_without_aneurysms_have_patches_too():
    empty = Sample("a", torch.rand(1, 16, 16, 16), torch.zeros(2, 16, 16, 16))
    assert dataset(1.0, centres=[[empty]])[0]["label"].sum() == 0
