"""MESA's trajectory loss."""

from __future__ import annotations

import pytest
import torch
from helpers import as_users_run_it, seeded
from torch.nn import functional

import gradkit as gk

Y = torch.randn(4, 3, 5, generator=seeded(1), dtype=torch.float64)
AVERAGED = 3 * torch.randn(4, 3, 5, generator=seeded(2), dtype=torch.float64)


def test_it_is_the_divergence_at_a_temperature() -> None:
    p, q = (
        torch.distributions.Categorical(logits=each.movedim(1, -1) / 2) for each in (AVERAGED, Y)
    )
    expected = 0.7 * 4 * torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(gk.mesa(Y, AVERAGED, lmbda=0.7, tau=2.0), expected)
    assert gk.mesa(Y, Y) == 0


def test_its_gradient_is_that_of_soft_targets() -> None:
    y = Y[..., 0].clone().requires_grad_()
    averaged = AVERAGED[..., 0].clone().requires_grad_()
    gk.mesa(y, averaged).backward()
    difference = functional.softmax(y / 5, 1) - functional.softmax(averaged / 5, 1)
    torch.testing.assert_close(y.grad, 0.3 * 5 * difference.detach() / 4)
    assert averaged.grad is None


def test_it_is_finite_where_logits_are_extreme_and_wide_under_autocast() -> None:
    certain = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = gk.mesa(certain, -certain)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(certain.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        half = gk.mesa(Y.bfloat16(), AVERAGED.bfloat16())
    assert half.dtype == torch.float32
    expected = gk.mesa(Y.bfloat16().double(), AVERAGED.bfloat16().double())
    torch.testing.assert_close(half.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lmbda": -1.0}, "lmbda is -1.0"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"averaged": AVERAGED[:, :2]}, r"shape \(4, 3, 5\) and the averaged ones \(4, 2, 5\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with as_users_run_it(), pytest.raises(ValueError, match=message):
        gk.mesa(Y, **{"averaged": AVERAGED, **arguments})
