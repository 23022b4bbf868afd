"""PBI; what holds of every weighting is in test_loss_weighting.py."""

import math

import pytest
import torch
from helpers import seeded
from torch import nn
from torchjd import scalarization

import gradkit as gk


@pytest.mark.parametrize("theta", [0.0, 0.3, 5.0])
def test_it_is_torchjds(theta):
    generator = seeded(0)
    for _ in range(20):
        losses, p, z = (torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(3))
        losses.requires_grad_()
        scalarization.PBI(theta, p, z)(losses).backward()
        weights = gk.PBI(p, theta, z)(losses)
        torch.testing.assert_close(weights, losses.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("losses", [[0.3, 0.9], [0.1, 0.3], [7e-9, 2.1e-8], [0.0, 0.0]])
def test_on_the_ray_only_the_distance_along_it_counts(losses):
    weights = gk.PBI([1.0, 3.0])(torch.tensor(losses, dtype=torch.float64))
    assert weights.tolist() == pytest.approx([1 / math.sqrt(10), 3 / math.sqrt(10)], rel=1e-12)


def test_it_ends_on_the_ray_where_no_weighted_sum_does():
    """The front, a quarter of a circle about the ideal point, is concave."""

    def train(weighting):
        angle = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        optimizer = gk.wrap(torch.optim.SGD([angle], lr=0.01), weighting)
        for _ in range(60):
            optimizer.step(lambda: {"a": angle.sin(), "b": angle.cos()})
        return angle.item()

    assert train(gk.PBI([1.0, 2.0])) == pytest.approx(math.atan(0.5), abs=0.06)
    assert train(gk.Constant([1.0, 2.0])) < 0  # it has passed the end of the front


def test_an_objective_far_below_the_ray_has_a_negative_weight():
    weights = gk.PBI(theta=5.0)(torch.tensor([0.1, 2.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([-4 / math.sqrt(2), 6 / math.sqrt(2)])


@pytest.mark.parametrize("make", [gk.PBI, gk.COSMOS], ids=["PBI", "COSMOS"])
def test_a_step_without_any_preferred_objective_is_refused(make):
    parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.1), make({"a": 1.0, "b": 0, "c": 0.0}))
    optimizer.step({"a": lambda: parameter * 1, "b": lambda: parameter * 2})
    before = parameter.item()
    found = r"needs an objective of positive preference, and the step has only 'b', 'c', so that"
    with pytest.raises(gk.NonFiniteError, match=found):
        optimizer.step({"b": lambda: parameter * 2, "c": lambda: parameter * 3})
    assert parameter.item() == before


@pytest.mark.parametrize("make", [gk.PBI, gk.COSMOS], ids=["PBI", "COSMOS"])
def test_the_preference_may_change_from_step_to_step(make):
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    weighting = make([1.0, 1.0])
    weighting(losses)
    weighting.preference = torch.tensor([0.2, 0.8])
    assert torch.equal(weighting(losses), make(torch.tensor([0.2, 0.8]))(losses))
    assert not torch.equal(weighting(losses), make([1.0, 1.0])(losses))


@pytest.mark.parametrize("make", [gk.PBI, gk.COSMOS], ids=["PBI", "COSMOS"])
def test_a_wrong_preference_is_refused_when_it_is_assigned_later_too(make):
    parameter = nn.Parameter(torch.tensor(1.0))
    weighting = make([1.0, 1.0])
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.1), weighting)
    for preference, message in (
        ([-1.0, 2.0], "a number in preference is -1.0; it must be at least 0"),
        ([0.0, 0.0], "which is no direction; make a number in it positive"),
        ([math.nan, 1.0], "a number in preference is nan"),
    ):
        weighting.preference = preference
        with pytest.raises(ValueError, match=message):
            optimizer.step({"a": lambda: parameter * 1, "b": lambda: parameter * 2})
    assert parameter.item() == 1
