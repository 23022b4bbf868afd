"""UW; what holds of every weighting is in test_loss_weighting.py."""

import pytest
import torch

import gradkit as gk
from weighting import references
from weighting.steps import CHANGING, columns, train


def test_uw_treats_each_objective_by_itself():
    found = train(gk.UW(lr=0.2), CHANGING)
    for objective, losses in columns(CHANGING).items():
        reference = references.UW(lr=0.2)
        expected = []
        for loss in losses:
            reference.begin(torch.tensor([loss], dtype=torch.float64))
            expected.append(float(0.5 * torch.exp(-reference.s.detach())))
            reference.end(torch.tensor([loss], dtype=torch.float64))
        mine = [step[objective] for step in found if objective in step]
        assert mine == pytest.approx(expected, rel=1e-12)


def test_uw_settles_where_the_weighted_losses_are_a_half():
    weighting = gk.UW(lr=0.05)
    losses = torch.tensor([1e-2, 1.0, 10.0], dtype=torch.float64)
    for _ in range(1000):
        weights = weighting(losses)
    torch.testing.assert_close(weights * losses, torch.full_like(losses, 0.5), rtol=1e-3, atol=0)
