"""GLS; what holds of every weighting is in test_loss_weighting.py."""

import torch

import gradkit as gk


def test_gls_of_many_or_extreme_losses_does_not_overflow():
    losses = torch.logspace(-200, 200, 50, dtype=torch.float64)
    weights = gk.GLS()(losses)
    torch.testing.assert_close(weights, 1 / (50 * losses), rtol=1e-9, atol=0)
