"""COSMOS; what holds of every weighting is in test_loss_weighting.py, and more in test_pbi.py."""

import pytest
import torch
from helpers import seeded
from torch import nn
from torchjd import scalarization

import gradkit as gk


@pytest.mark.parametrize("lmbda", [0.0, 0.01, 8.0])
def test_it_is_torchjds(lmbda):
    generator = seeded(0)
    for _ in range(20):
        losses, r = (torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(2))
        losses = (losses - 0.1).requires_grad_()  # the cosine is of negative losses, too
        scalarization.COSMOS(lmbda, r)(losses).backward()
        torch.testing.assert_close(gk.COSMOS(r, lmbda)(losses), losses.grad, rtol=1e-9, atol=1e-12)


def test_losses_that_are_all_0_have_no_cosine():
    weights = gk.COSMOS([0.25, 0.75])(torch.zeros(2, dtype=torch.float64))
    assert weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("first", [0.2, 0.5, 0.8])
def test_steps_end_where_its_scalar_is_least(first):
    """Found by a search on a grid; a weighted sum alone ends elsewhere."""
    r, lmbda = torch.tensor([first, 1 - first], dtype=torch.float64), 0.5

    def losses(z):
        return torch.stack([z.square(), (1 - z).square() + 0.3])

    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(losses(grid), r[:, None], dim=0)
    wanted = grid[(r @ losses(grid) - lmbda * cosine).argmin()]
    z = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([z], lr=0.1), gk.COSMOS(r, lmbda))
    for _ in range(200):
        optimizer.step(lambda: dict(zip("ab", losses(z), strict=True)))
    assert z.item() == pytest.approx(wanted.item(), abs=2e-5)
    assert abs(z.item() - (1 - first)) > 0.02
