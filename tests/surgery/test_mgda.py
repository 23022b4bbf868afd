"""MGDA; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd
from helpers import jacobians
from hypothesis import given, settings
from torch import nn

import gradkit as gk
from surgery.rule_steps import matrices


def test_mgda_is_never_longer_than_torchjds_and_close_to_it():
    theirs = jd.MGDA(epsilon=1e-9, max_iters=200)
    for matrix in matrices():
        ours, expected = gk.MGDA()(matrix).norm(), theirs(matrix).norm()
        assert float(ours) <= float(expected) + 1e-9
        assert float(expected - ours) < 0.1  # Frank-Wolfe has not quite arrived


@settings(deadline=None, max_examples=60)
@given(jacobians(1, 6))
def test_mgda_is_the_shortest_vector(jacobian):
    """d is the shortest in the hull if and only if ⟨g_i, d⟩ ≥ ‖d‖² for all i."""
    direction = gk.MGDA()(jacobian)
    products = jacobian @ direction
    scale = float(jacobian.square().sum()) + 1
    assert float((products - direction.square().sum()).min()) >= -1e-9 * scale


def test_where_mgda_looks_for_its_weights():
    matrix = matrices()[9]
    losses = torch.linspace(0.5, 2, len(matrix), dtype=torch.float64)
    lengths = matrix.norm(dim=1)
    for normalization, divisors in {
        "l2": lengths,
        "loss": losses,
        "loss+": losses * lengths,
    }.items():
        rule = gk.MGDA(normalization=normalization)
        weights = gk.MGDA().weights((matrix / divisors[:, None]) @ (matrix / divisors[:, None]).T)
        torch.testing.assert_close(rule(matrix, losses), weights @ matrix)
    with pytest.raises(ValueError, match="works on losses, too; pass losses="):
        gk.MGDA(normalization="loss")(matrix)
    zero = torch.zeros(2, 3)
    assert gk.MGDA(normalization="l2")(zero).tolist() == [0.0] * 3


def test_losses_reach_the_rule_in_a_step():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), gk.MGDA(normalization="loss"))
    point = weight.detach().clone()
    optimizer.step({"a": lambda: weight.square().sum(), "b": lambda: weight.prod() * 3})
    rows = torch.stack([2 * point, 3 * point.flip(0)])
    losses = torch.tensor([5.0, 6.0], dtype=torch.float64)
    expected = gk.MGDA(normalization="loss")(rows, losses)
    torch.testing.assert_close(point - weight.detach(), expected)
