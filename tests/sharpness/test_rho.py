"""Radii that follow the learning rate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import as_users_run_it
from torch import Tensor, nn

import gradkit as gk

RHO = gk.sharpness.RhoByLR(rho_max=0.5, rho_min=0.1, lr_max=0.4, lr_min=0.1)


def wrapped(make: Any, lrs: tuple[float, ...]) -> tuple[list[nn.Parameter], Any]:
    weights = [nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64)) for _ in lrs]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)]
    return weights, gk.wrap(torch.optim.SGD(groups, lr=1.0), make)


def loss(weights: list[nn.Parameter]) -> Tensor:
    return sum(w.pow(4).sum() for w in weights)  # type: ignore[return-value]  # not empty


@pytest.mark.parametrize("lrs", [(0.4,), (0.4, 0.2)], ids=["one group", "two groups"])
def test_the_radius_is_linear_in_each_groups_learning_rate(lrs: tuple[float, ...]) -> None:
    weights, optimizer = wrapped(gk.SAM(rho=RHO), lrs)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for number in range(3):
        before = [w.detach().clone() for w in weights]
        optimizer.step(lambda: loss(weights))
        g = [4 * w**3 for w in before]
        norm = torch.cat(g).norm()
        for lr, w, direction, parameter in zip(lrs, before, g, weights, strict=True):
            now = lr * 0.5**number
            rho = 0.1 + 0.4 * min(max((now - 0.1) / 0.3, 0.0), 1.0)
            expected = w - now * 4 * (w + rho * direction / norm) ** 3
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-11)
        schedule.step()


def test_it_needs_no_state_of_its_own_to_resume() -> None:
    weights, optimizer = wrapped(gk.GSAM(rho=RHO), (0.4, 0.2))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    optimizer.step(lambda: loss(weights) / 100)
    schedule.step()
    other, resumed = wrapped(gk.GSAM(rho=RHO), (0.4, 0.2))
    for mine, theirs in zip(other, weights, strict=True):
        mine.data = theirs.data.clone()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(lambda: loss(weights) / 100)
    resumed.step(lambda: loss(other) / 100)
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))


def test_an_entry_of_the_group_comes_first() -> None:
    seen: list[float] = []
    weights, optimizer = wrapped(gk.SAM(rho=RHO), (0.4,))
    optimizer.param_groups[0]["rho"] = 2.0
    optimizer.step(lambda: seen.append(weights[0].detach().clone()) or loss(weights))
    assert torch.isclose((seen[1] - seen[0]).norm(), torch.tensor(2.0, dtype=torch.float64))


def test_a_setting_of_the_base_called_rho_is_no_radius() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    base = torch.optim.Adadelta([w], lr=0.1, rho=0.9)
    optimizer = gk.wrap(base, gk.SAM(rho=0.5))
    seen: list[Tensor] = []
    for _ in range(2):
        seen.clear()
        optimizer.step(lambda: seen.append(w.detach().clone()) or w.pow(4).sum())
        assert torch.isclose((seen[1] - seen[0]).norm(), torch.tensor(0.5, dtype=torch.float64))
    assert base.param_groups[0]["rho"] == 0.9


def test_bad_radii_are_named() -> None:
    for arguments, message in (
        ({"rho_min": -0.1}, "rho_min is -0.1"),
        ({"lr_min": 0.4}, "lr_min is 0.4"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.sharpness.RhoByLR(**{"rho_max": 0.5, "rho_min": 0.1, "lr_max": 0.4, **arguments})
    with as_users_run_it(), pytest.raises(TypeError, match="GAM has two radii"):
        gk.GAM(rho=RHO)
    weights, optimizer = wrapped(gk.SAM(rho=lambda lr: -lr), (0.4,))
    with pytest.raises(ValueError, match=r"rho of parameter group 0 is -0\.4"):
        optimizer.step(lambda: loss(weights))
    optimizer.param_groups[0]["rho"] = float("nan")
    with pytest.raises(ValueError, match="rho of parameter group 0 is nan"):
        optimizer.step(lambda: loss(weights))
