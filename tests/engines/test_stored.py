"""Steps on gradients that are in `.grad` already."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradkit as gk

ENGINES = ["functional", "inplace"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


INPUT = torch.arange(12.0).reshape(4, 3).cos()


def test_gradients_in_grad_step_without_closure() -> None:
    bare_model, wrapped_model = network(), network()
    bare = torch.optim.Adam(bare_model.parameters())
    wrapped = gk.wrap(torch.optim.Adam(wrapped_model.parameters()), gk.Sum(), model=wrapped_model)
    for _ in range(3):
        for model, optimizer in ((bare_model, bare), (wrapped_model, wrapped)):
            optimizer.zero_grad()
            model(INPUT).square().mean().backward()
            assert optimizer.step() is None
    for ours, theirs in zip(wrapped_model.parameters(), bare_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [((gk.SAM(),), "pass step\\(\\) a closure"), ((gk.LookAhead(),), "needs the objective")],
)
def test_a_transform_that_evaluates_again_needs_a_closure(transforms, message) -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), *transforms, model=model)
    model(INPUT).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_without_closure_or_gradient_nothing_happens() -> None:
    model = network()
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(), model=model)
    weights = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="nothing to step on: no parameter has a gradient"):
        assert optimizer.step() is None
    assert not optimizer.last_step.applied
    assert optimizer.step() is None  # said once
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_without_gradient_steps_on_what_grad_held(engine: str) -> None:
    model = network()
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), gk.Sum(), model=model, engine=engine
    )
    model(INPUT).sum().backward()
    grad, weight = model[3].weight.grad.clone(), model[3].weight.detach().clone()
    reported = torch.tensor(7.0)
    assert optimizer.step(lambda: reported) == 7.0
    assert torch.equal(model[3].weight, weight - 0.1 * grad)
