"""Whole volumes by windows: where they are placed, mirroring, and the scores of cases."""

import pytest
import torch
from torch import nn

from examples.aneurysm.inference import score_case, score_volumes, segment_volume
from examples.aneurysm.networks import Output
from examples.common.datasets import Sample

CPU = torch.device("cpu")


class Threshold(nn.Module):
    """Vessel above 1, aneurysm above 3; sees single voxels, so that windows do not matter."""

    def __init__(self):
        super().__init__()
        self.shapes = []
        self.was_training = None

    def forward(self, image):
        self.shapes.append(tuple(image.shape))
        self.was_training = self.training
        logits = torch.cat([torch.zeros_like(image), image - 1, 2 * image - 4], 1)
        return Output(5 * logits, image, image)


class Leftmost(Threshold):
    """Sees which side is left: not the same for a mirrored volume."""

    def forward(self, image):
        logits = torch.zeros(len(image), 3, *image.shape[2:])
        logits[:, 1] = torch.linspace(3, -3, image.shape[-1])
        logits[:, 2] = -9
        return Output(logits, image, image)


def volume(shape=(20, 17, 24)):
    return 3 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).abs()


@pytest.mark.parametrize("shape", [(20, 17, 24), (10, 12, 9)])
def test_a_voxelwise_network_is_not_changed_by_windows(shape):
    image, model = volume(shape), Threshold().train()
    found = segment_volume(model, image, 16, CPU)
    assert torch.equal(found, (image[0] > 1).long() + (image[0] > 3).long())
    assert {each[2:] for each in model.shapes} == {(16, 16, 16)}
    assert model.training
    assert model.was_training is False


def test_mirrored_predictions_are_averaged():
    image = volume((16, 16, 16))
    plain, mirrored = (segment_volume(Leftmost(), image, 16, CPU, mirror=m) for m in (0, 1))
    assert (plain[..., :8] == 1).all()
    assert (plain[..., 8:] == 0).all()
    assert torch.equal(mirrored, mirrored.flip(2))
    eight = Threshold()
    segment_volume(eight, image, 16, CPU, mirror=True)
    assert len(eight.shapes) == 8


def test_scores_are_of_the_aneurysm():
    prediction = torch.tensor([[[0, 1, 2, 2]]])
    target = torch.tensor([[[[0, 1, 0, 0]]], [[[0, 0, 0, 1]]]]).float()
    scores = score_case(prediction, target)
    assert scores == pytest.approx(
        {"dsc": 200 / 3, "sen": 100, "jac": 50, "vs": 100 - 100 / 3, "empty": 0}
    )


@pytest.mark.parametrize(
    ("predicted", "actual", "dsc"), [(True, False, 0), (False, True, 0), (False, False, 100)]
)
def test_empty_cases_are_counted(predicted, actual, dsc):
    prediction = torch.full((1, 1, 2), 2 if predicted else 1)
    target = torch.stack([torch.ones(1, 1, 2), torch.full((1, 1, 2), float(actual))])
    scores = score_case(prediction, target)
    assert scores["empty"] == 100
    assert scores["dsc"] == scores["vs"] == dsc


def test_chosen_cases_in_their_order():
    samples = [Sample(str(k), volume() + k, torch.ones(2, 20, 17, 24)) for k in range(3)]
    scores, labels = score_volumes(Threshold(), samples, 16, CPU, cases=[2, 0])
    assert [each.case for each in scores] == ["2", "0"]
    assert torch.equal(labels[1], segment_volume(Threshold(), samples[0].image, 16, CPU))
