"""SAR beside an independent reference, its filter and its restarts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceMomentum,
    binary,
    gradients,
    images,
    network,
    reference_forward,
)
from tta.references import source_weights as weights_of

LIMIT = 0.66


@pytest.mark.parametrize("reset_threshold", [0.0, 0.626])
def test_sar_equals_an_independent_reference(reset_threshold: float) -> None:
    model = network()
    adapter = gk.tta.SAR(
        model, lr=0.05, rho=0.1, entropy_threshold=LIMIT, reset_threshold=reset_threshold
    )
    weights, optimizer, mean, restarts = weights_of(model), ReferenceMomentum(0.05), None, 0
    for x in images(6):
        first = binary(reference_forward(weights, x)) < LIMIT
        assert 0 < first.sum() < first.numel()  # so that the filter matters

        def loss(w, kept=first):
            return binary(reference_forward(w, x))[kept].mean()

        g = gradients(weights, AFFINE, loss)
        norm = math.sqrt(sum(float((each**2).sum()) for each in g.values()))
        ahead = {**weights, **{name: weights[name] + 0.1 * g[name] / norm for name in AFFINE}}
        both = first & (binary(reference_forward(ahead, x)) < LIMIT)
        assert (both != first).any()  # so that filtering again matters
        optimizer.step(weights, gradients(ahead, AFFINE, lambda w: loss(w, both)))
        value = float(loss(ahead, both))
        mean = value if mean is None else 0.9 * mean + 0.1 * value
        restart = mean < reset_threshold
        logits = adapter(x)
        assert adapter.facts["mean_loss"] == pytest.approx(mean, rel=1e-9)
        assert adapter.facts["restarted"] == restart
        assert adapter.facts["kept"].item() == pytest.approx(both.double().mean().item())
        if restart:
            weights, optimizer, mean = weights_of(model), ReferenceMomentum(0.05), None
            restarts += 1
        torch.testing.assert_close(logits, reference_forward(weights, x), rtol=1e-9, atol=1e-9)
    assert restarts == 0 if reset_threshold == 0 else 0 < restarts < 6


def test_an_infinite_restart_threshold_is_ptbn() -> None:
    sar = gk.tta.SAR(network(), lr=0.1, entropy_threshold=10.0, reset_threshold=math.inf)
    ptbn = gk.tta.PTBN(network())
    for x in images(3):
        assert torch.equal(sar(x), ptbn(x))
        assert sar.last_step.applied


def test_a_filter_that_keeps_nothing_takes_no_step() -> None:
    adapter = gk.tta.SAR(network(), lr=0.1, entropy_threshold=1e-9)
    before = gk.testing.bits(adapter.state_dict())
    adapter(images(1)[0])
    assert not adapter.last_step.applied
    assert adapter.facts["kept"] == 0
    assert gk.testing.bits(adapter.state_dict()) == before


class Steep(nn.Module):
    """Certain at the source's weights, uncertain a little way uphill."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        return (4 - 100 * self.norm.bias + 0 * self.norm(x)).expand(1, 1, 2, 2)


def test_a_filter_that_keeps_nothing_at_the_displaced_weights_takes_no_step() -> None:
    adapter = gk.tta.SAR(Steep().eval(), lr=0.1, entropy_threshold=0.3, reset_threshold=0.0)
    before = gk.testing.bits(adapter.state_dict())
    adapter(torch.rand(1, 1, 2, 2))
    assert not adapter.last_step.applied
    assert gk.testing.bits(adapter.state_dict()) == before


def test_thresholds_are_those_of_the_number_of_outcomes() -> None:
    objective = gk.tta.ReliableEntropy()
    for shape, probabilities, expected in (
        ((1, 2, 4, 4), "auto", 0.4 * math.log(2)),
        ((2, 10), "auto", 0.4 * math.log(10)),
        ((1, 3, 4, 4), "softmax", 0.4 * math.log(3)),
    ):
        objective = gk.tta.ReliableEntropy(probabilities=probabilities)
        objective(lambda x: torch.zeros(shape), torch.rand(shape[0], 3, 4, 4))
        assert objective.limit == pytest.approx(expected)


def test_the_scaled_restart_threshold_is_a_share_of_the_entropy_threshold() -> None:
    share = 0.2 / (0.4 * math.log(1000))
    for factor, restarted in ((0.99, True), (1.01, False)):
        adapter = gk.tta.SAR(network(), entropy_threshold=10.0, reset_threshold="scaled")
        x = images(1)[0]
        adapter(x)
        loss = adapter.facts["mean_loss"]
        adapter = gk.tta.SAR(
            network(), entropy_threshold=loss * factor**-1 / share, reset_threshold="scaled"
        )
        adapter(x)
        assert adapter.facts["restarted"] == restarted


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer3, self.layer4, self.head = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        return self.head(self.layer4(self.layer3(x)))


def test_the_last_blocks_are_not_trained() -> None:
    names = gk.tta.SAR(Blocks()).trained()
    assert list(names) == ["layer3.weight", "layer3.bias", "head.weight", "head.bias"]
    names = gk.tta.SAR(Blocks(), excluded=("layer3", "head")).trained()
    assert list(names) == ["layer4.weight", "layer4.bias"]


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"entropy_threshold": 0}, "entropy_threshold is 0"),
        ({"reset_threshold": math.nan}, "threshold is nan"),
        ({"rho": -1.0}, "rho is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.SAR(network(), **arguments)
    with as_users_run_it(), pytest.raises(ValueError, match="'literal'"):
        gk.tta.SAR(network(), reset_threshold="literal")
