"""IMTL-L; what holds of every weighting is in test_loss_weighting.py."""

import pytest
import torch
from helpers import relative_error, seeded
from torch import nn
from torchjd import scalarization

import gradkit as gk
from weighting.steps import CHANGING, columns, train


def test_each_objective_learns_a_scale_of_its_own():
    found = train(gk.IMTLL(lr=0.2), CHANGING)
    for objective, losses in columns(CHANGING).items():
        s = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([s], lr=0.2)
        expected = []
        for loss in losses:
            expected.append(float(s.detach().exp()))
            optimizer.zero_grad()
            (s.exp() * loss - s).backward()
            optimizer.step()
        mine = [step[objective] for step in found if objective in step]
        assert mine == pytest.approx(expected, rel=1e-12)


def test_it_settles_where_all_weighted_losses_are_1():
    weighting = gk.IMTLL(lr=0.05)
    losses = torch.tensor([1e-2, 1.0, 10.0], dtype=torch.float64)
    for _ in range(1000):
        weights = weighting(losses)
    torch.testing.assert_close(weights * losses, torch.ones_like(losses), rtol=1e-3, atol=0)


def test_it_is_torchjds_with_an_adam_for_the_scales():
    theirs = scalarization.IMTLL(3).double()
    adam = torch.optim.Adam(theirs.parameters(), lr=0.1)
    weighting = gk.IMTLL(lr=0.1)
    for _ in range(20):
        losses = torch.rand(3, generator=seeded(0), dtype=torch.float64, requires_grad=True)
        adam.zero_grad()
        theirs(losses).backward()
        adam.step()
        torch.testing.assert_close(weighting(losses.detach()), losses.grad, rtol=1e-10, atol=0)


def test_with_imtl_g_on_the_trunk_it_is_the_papers_hybrid():
    """Heads get their scaled gradients; the trunk's projections on all scaled ones are equal."""
    lr, count = 0.1, 3
    trunk = nn.Parameter(torch.randn(5, generator=seeded(1), dtype=torch.float64))
    heads = [nn.Parameter(torch.ones((), dtype=torch.float64) * (k + 1)) for k in range(count)]
    x = torch.randn(count, 5, generator=seeded(2), dtype=torch.float64)

    def losses(trunk, heads):
        return (torch.stack(list(heads)) * (x @ trunk) - 1) ** 2

    optimizer = gk.wrap(
        torch.optim.SGD([trunk, *heads], lr=0.01), gk.IMTLL(lr=lr), gk.IMTLG(scope="shared")
    )
    weights = [each.detach().clone().requires_grad_() for each in (trunk, *heads)]
    s = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=lr)
    for _ in range(4):
        scaled = s.exp() * losses(weights[0], weights[1:]) - s
        rows = torch.stack(
            [torch.autograd.grad(one, weights[0], retain_graph=True)[0] for one in scaled]
        )
        units = rows / rows.norm(dim=1, keepdim=True)
        # α of the paper: (Σ α g)·(u_1 − u_k) = 0 for all k, and Σ α = 1.
        system = torch.cat([(units[0] - units[1:]) @ rows.T, torch.ones(1, count).double()])
        alpha = torch.linalg.solve(system, torch.tensor([0.0] * (count - 1) + [1.0]).double())
        of_heads = torch.autograd.grad(scaled.sum(), weights[1:], retain_graph=True)
        (s.grad,) = torch.autograd.grad(scaled.sum(), s)
        with torch.no_grad():
            for weight, gradient in zip(weights, (alpha @ rows, *of_heads), strict=True):
                weight -= 0.01 * gradient
        adam.step()
        optimizer.step(lambda: dict(zip("abc", losses(trunk, heads), strict=True)))
        for mine, theirs in zip((trunk, *heads), weights, strict=True):
            assert relative_error(mine.detach(), theirs.detach()) < 1e-8
