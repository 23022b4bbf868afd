"""InTEnt beside an independent reference."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from tta.references import images, network, reference_forward, reference_moments, running
from tta.references import source_weights as weights_of

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def bits(p):
    return -(p * p.log2() + (1 - p) * (1 - p).log2())


def balanced(p):
    groups = [bits(p)[mask] for mask in (p < 0.5, p >= 0.5) if mask.any()]
    return -sum(float(group.mean()) for group in groups) / len(groups)


@pytest.mark.parametrize("score", ["entropy", "balanced"])
def test_intent_equals_an_independent_reference(score: str) -> None:
    model = network()
    with torch.no_grad():  # so that both classes are predicted
        model[7].bias -= gk.tta.PTBN(model)(images(1)[0]).mean(dim=(0, 2, 3))
    adapter, weights, source = gk.tta.InTEnt(model, score=score), weights_of(model), running(model)
    for x in images(3):
        measured = {}

        def measuring(x, layer):
            mean, var = reference_moments(x, layer)
            count = x.numel() / x.shape[1]
            measured[layer] = mean, var * count / (count - 1)
            return mean, var

        reference_forward(weights, x, measuring)
        p, scores = [], []
        for r in SHARES:

            def mixed(x, layer, r=r):
                pairs = zip(source[layer], measured[layer], strict=True)
                return [(1 - r) * there + r * here for there, here in pairs]

            p.append(torch.sigmoid(reference_forward(weights, x, mixed)))
            scores.append(1 - float(bits(p[-1]).mean()) if score == "entropy" else balanced(p[-1]))
        both = [((each < 0.5).any() and (each >= 0.5).any()).item() for each in p]
        assert any(both)
        assert not all(both)
        if score == "balanced":
            scores = [(s - min(scores)) / (max(scores) - min(scores)) for s in scores]
        total = sum(math.exp(s) for s in scores)
        expected = sum(math.exp(s) / total * each for s, each in zip(scores, p, strict=True))
        torch.testing.assert_close(torch.sigmoid(adapter(x)), expected, rtol=1e-9, atol=1e-9)
        weights_found = adapter.facts["weights"][0].tolist()
        assert weights_found == pytest.approx([math.exp(s) / total for s in scores])


def test_each_image_has_its_own_weights() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    adapter = gk.tta.InTEnt(model, probabilities="softmax")
    adapter(torch.tensor([[9.0, 0.0], [0.0, 0.1]]))
    weights = adapter.facts["weights"]
    assert weights.shape == (2, 6)
    assert not torch.allclose(weights[0], weights[1])
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


def test_outcomes_that_are_not_predicted_do_not_count() -> None:
    p = torch.tensor([0.9, 0.8])
    both = torch.stack([p, 1 - p]).reshape(1, 1, 2, 2)
    h = -(both * both.log()).sum(2).mean()
    torch.testing.assert_close(gk.tta.intent.balanced_entropy(both), h.reshape(1))


def test_one_share_is_that_mixture() -> None:
    adapter = gk.tta.InTEnt(network(), shares=(0.0,), score="balanced")
    for x in images(2):
        torch.testing.assert_close(adapter(x), gk.tta.NoAdapt(network())(x))


def test_layers_that_are_called_twice_have_moments_of_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, eps=0.0)

        def forward(self, x):
            return self.norm(3 * self.norm(x) + 7)

    x = torch.tensor([[0.0], [2.0]])
    adapter = gk.tta.InTEnt(Twice().eval(), shares=(1.0, 1.0))
    expected = torch.tensor([[-1.0], [1.0]]) / 2**0.5  # unbiased, of values ±3/√2 + 7 about 7
    expected = expected * 3 / 18**0.5
    torch.testing.assert_close(adapter(x), expected)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"shares": ()}, "shares is empty"),
        ({"shares": (0.5, 1.5)}, "shares is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.InTEnt(network(), **arguments)
    with as_users_run_it(), pytest.raises(ValueError, match="score is 'sharpness'"):
        gk.tta.InTEnt(network(), score="sharpness")
    with pytest.raises(ValueError, match=r"pass statistics=gk\.tta\.Interpolated\(\)"):
        gk.tta.PTBN(network(), predict=gk.tta.Integration())
    with pytest.raises(ValueError, match="at least 2 values a channel"):
        gk.tta.InTEnt(nn.BatchNorm1d(2))(torch.rand(1, 2))
