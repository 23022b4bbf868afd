"""CAGrad; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

import pytest
import torch
from helpers import jacobians, seeded
from hypothesis import given, settings
from torch import nn

import gradkit as gk
from surgery.rule_steps import matrices, min_norm


@settings(deadline=None, max_examples=60)
@given(jacobians(1, 5))
def test_cagrad_beats_every_other_direction_in_its_ball(jacobian):
    c = 0.5
    mean = jacobian.mean(0)
    direction = gk.CAGrad(c=c)(jacobian)
    scale = float(jacobian.abs().max()) + 1
    assert float((direction - mean).norm()) <= c * float(mean.norm()) + 1e-7 * scale
    if min_norm(jacobian) < 1e-3 * scale:
        return  # Pareto-stationary: documented to be the mean
    worst = float((jacobian @ direction).min())
    others = torch.randn(200, jacobian.shape[1], generator=seeded(0), dtype=torch.float64)
    others = mean + c * mean.norm() * others / others.norm(dim=1, keepdim=True)
    assert worst >= float((others @ jacobian.T).min(1).values.max()) - 1e-6 * scale**2


def test_cagrad_between_its_ends():
    matrix = matrices()[7]
    torch.testing.assert_close(gk.CAGrad(c=0.0)(matrix), matrix.mean(0))
    far = gk.CAGrad(c=1e4)(matrix)
    shortest = gk.MGDA()(matrix)
    assert float(nn.functional.cosine_similarity(far, shortest, dim=0)) > 1 - 1e-6


def test_at_a_pareto_stationary_point_cagrad_worsens_none_where_its_ball_allows_it():
    matrix = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert min_norm(matrix) < 1e-12
    # The nearest point to (1/3, 1/3) without a first component is 1/3 away.
    near = torch.tensor([0.0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(gk.CAGrad(c=0.75)(matrix), near, rtol=0, atol=1e-7)
    # Two opposite gradients: the ball around 0.5 of radius 0.25 does not hold 0.
    assert gk.CAGrad()(matrix[:2]).tolist() == pytest.approx([0.25, 0.0])
    assert gk.CAGrad(c=1.0)(matrix[:2]).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
