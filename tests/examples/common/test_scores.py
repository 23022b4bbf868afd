import pytest
import torch
from torch import nn

from examples.common.datasets import Sample
from examples.common.metrics import dice_of
from examples.common.scores import CaseScores, mean_scores, score_cases


def test_means_are_over_cases_and_over_scores():
    cases = [CaseScores("a", {"x": 1.0, "y": 5.0}), CaseScores("b", {"y": 7.0, "x": 2.0})]
    assert mean_scores(cases) == {"x": 1.5, "y": 6.0}
    assert [case.mean for case in cases] == [3.0, 4.5]
    with pytest.raises(ValueError, match="no cases"):
        mean_scores([])


class Threshold(nn.Module):
    """Its logits tell where the image exceeds a half, while it is in evaluation mode."""

    def forward(self, image):
        assert not self.training
        return image - 0.5


@pytest.mark.parametrize("space", [(6, 5), (6, 5, 4)])
def test_cases_are_scored_by_their_own_targets(space):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, *space, generator=generator) for _ in range(3)]
    samples = [Sample(str(n), image, (image >= 0.5).float()) for n, image in enumerate(images)]
    samples.append(Sample("last", images[0], (images[0] < 0.5).float()))
    cases = score_cases(Threshold(), samples, torch.device("cpu"), dice_of(("large", "small")))
    assert [case.case for case in cases] == ["0", "1", "2", "last"]
    assert [case.mean for case in cases] == pytest.approx([100, 100, 100, 0], abs=1e-5)
    assert list(cases[0].scores) == ["large", "small"]
