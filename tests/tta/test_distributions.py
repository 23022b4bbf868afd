"""Logits as distributions over outcomes."""

from __future__ import annotations

import math

import pytest
import torch

from gradkit.tta.distributions import (
    cross_entropies,
    entropies,
    log_distributions,
    threshold_of,
    to_logits,
)


@pytest.mark.parametrize("probabilities", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_each_unit_is_a_distribution(probabilities: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = log_distributions(z, probabilities)
    p = log_p.exp()
    torch.testing.assert_close(p.sum(dim=2), torch.ones_like(p[:, :, 0]))
    units = {"softmax": (1, shape[1]), "sigmoid": (shape[1], 2)}[probabilities]
    assert p.shape == (shape[0], *units, *shape[2:])
    expected = z.softmax(1) if probabilities == "softmax" else torch.sigmoid(z)
    torch.testing.assert_close(p[:, 0] if probabilities == "softmax" else p[:, :, 0], expected)
    h = -(p * p.log()).sum(dim=2)
    torch.testing.assert_close(entropies(log_p), h)
    torch.testing.assert_close(cross_entropies(p, log_p), h)
    assert threshold_of(log_p) == pytest.approx(0.4 * math.log(units[1]))
    again = log_distributions(to_logits(p, probabilities, z), probabilities)
    torch.testing.assert_close(again, log_p)


def test_certain_predictions_have_entropies_and_gradients_without_nan() -> None:
    z = torch.tensor([[0.0, -math.inf], [1e4, -1e4]], requires_grad=True)
    for probabilities in ("softmax", "sigmoid"):
        h = entropies(log_distributions(z, probabilities))
        assert torch.isfinite(h).all()
        (gradient,) = torch.autograd.grad(h[1].sum(), z)
        assert torch.isfinite(gradient[1]).all()
    assert entropies(log_distributions(torch.tensor([[80.0, -80.0]]), "sigmoid")).max() > 0
