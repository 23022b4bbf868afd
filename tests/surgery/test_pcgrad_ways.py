"""PCGrad's weights in Python's numbers, in numpy and in torch are the same."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded

import gradkit as gk
from gradkit.surgery import pcgrad
from gradkit.surgery.pcgrad import pcgrad_weights

WAYS = ("few", "numpy", "torch")


def weights_by(way, gram, order, monkeypatch):
    """The weights by one way, and whether it was taken."""
    taken = []
    project, project_few = pcgrad._project, pcgrad._project_few

    def spy(module, *others):
        taken.append(module.__name__)
        project(module, *others)

    def spy_few(*arguments):
        taken.append("few")
        return project_few(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pcgrad, "_project", spy)
        patch.setattr(pcgrad, "_project_few", spy_few)
        patch.setattr(pcgrad, "_FEW", 99 if way == "few" else 0)
        weights = pcgrad_weights(gram.clone().requires_grad_(way == "torch"), order)
    assert taken == [way]
    return weights.detach()


@pytest.mark.parametrize("count", [3, 4, 8, 17])
def test_three_ways_agree(count, monkeypatch):
    generator = seeded(count)
    for scale in (1.0, 1e-9, 1e9):
        rows = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        rows *= torch.logspace(-3, 3, count, dtype=torch.float64)[:, None] * scale
        rows[1] = 0
        rows[2] = -rows[0]
        gram = rows @ rows.T
        order = gk.PCGrad(generator=generator).draw(count)
        few, *others = [weights_by(way, gram, order, monkeypatch) for way in WAYS]
        for other in others:
            torch.testing.assert_close(
                other, few, rtol=0, atol=2e-15 * count * float(few.abs().max())
            )


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_is_not_passed_over(way, monkeypatch):
    rows = torch.randn(4, 6, generator=seeded(0), dtype=torch.float64)
    rows[2, 1] = torch.nan
    order = gk.PCGrad().draw(4)
    assert weights_by(way, rows @ rows.T, order, monkeypatch).isnan().any()


def test_a_nan_is_not_passed_over_by_the_closed_form():
    gram = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    assert pcgrad_weights(gram).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_narrow_gram_matrices_are_worked_on_in_float64(dtype, count):
    rows = torch.randn(count, 6, generator=seeded(1), dtype=torch.float64)
    gram, order = (rows @ rows.T).to(dtype), gk.PCGrad().draw(count)
    found = pcgrad_weights(gram, order)
    assert found.dtype == dtype
    assert torch.equal(found, pcgrad_weights(gram.double(), order).to(dtype))
