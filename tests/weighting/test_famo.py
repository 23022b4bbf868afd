"""FAMO; what holds of every weighting is in test_loss_weighting.py."""

import math

import pytest
import torch

import gradkit as gk
from weighting.steps import CHANGING, train


def test_famo_judges_the_fall_since_an_objective_was_last_there():
    lr, decay = 0.1, 0.01
    found = train(gk.FAMO(lr, decay), CHANGING)
    xi: dict[str, torch.Tensor] = {}
    optimizers: dict[str, torch.optim.Adam] = {}
    before: dict[str, float] = {}
    for step, losses in enumerate(CHANGING):
        known = [name for name in losses if name in before]
        for name in losses:
            if name not in xi:
                xi[name] = torch.zeros((), dtype=torch.float64, requires_grad=True)
                optimizers[name] = torch.optim.Adam([xi[name]], lr=lr, weight_decay=decay)
        if known:
            z = torch.stack([xi[name] for name in known]).softmax(0)
            falls = [math.log(before[n] + 1e-8) - math.log(losses[n] + 1e-8) for n in known]
            (z * torch.tensor(falls)).sum().backward()
            for name in known:
                optimizers[name].step()
                optimizers[name].zero_grad()
        z = torch.stack([xi[name].detach() for name in losses]).softmax(0)
        shares = z / (torch.tensor([*losses.values()], dtype=torch.float64) + 1e-8)
        assert list(found[step].values()) == pytest.approx((shares / shares.sum()).tolist())
        before.update(losses)


def test_the_lowest_losses_of_famo_go_by_name_or_order():
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    expected = gk.FAMO()(losses - torch.tensor([0.5, -1.0]))
    by_order = gk.FAMO(min_losses=[0.5, -1.0])
    torch.testing.assert_close(by_order(losses), expected)
    by_name = gk.FAMO(min_losses={"b": -1.0, "a": 0.5, "c": 0.0})
    found = train(by_name, [{"a": 1.0, "b": 3.0}, {"b": 3.0}])
    assert list(found[0].values()) == pytest.approx(expected.tolist())
    assert found[1]["b"] == 1.0
    with pytest.raises(ValueError, match="there are 2 numbers"):
        by_order(torch.ones(3))
    with pytest.raises(ValueError, match="no number for the objective 'd'"):
        train(gk.FAMO(min_losses={"a": 0.5}), [{"a": 1.0, "d": 3.0}])


def test_famo_turns_to_the_loss_that_falls_least():
    weighting = gk.FAMO()
    for step in range(50):
        weighting(torch.tensor([2.0 * 0.9**step, 3.0], dtype=torch.float64))
    first, second = weighting.state["xi"].tolist()
    assert first < -0.5 < 0.5 < second
