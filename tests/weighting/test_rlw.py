"""RLW; what holds of every weighting is in test_loss_weighting.py."""

import pytest
import torch
from helpers import seeded

import gradkit as gk


def test_rlw_is_the_softmax_of_normal_numbers():
    weighting = gk.RLW(seeded(0))
    weights = torch.stack([weighting(torch.ones(4, dtype=torch.float64)) for _ in range(4000)])
    torch.testing.assert_close(weights.sum(1), torch.ones(4000, dtype=torch.float64))
    torch.testing.assert_close(weights.mean(0), torch.full((4,), 0.25).double(), atol=0.01, rtol=0)
    logs = weights.log()
    spread = (logs - logs.mean(1, keepdim=True)).square().sum(1).mean() / 3
    assert float(spread) == pytest.approx(1.0, abs=0.05)
