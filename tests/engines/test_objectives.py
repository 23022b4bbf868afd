"""Objectives that are refused, each with its error."""

from __future__ import annotations

import pytest
import torch
from helpers import as_users_run_it
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from gradkit.testing import bits as plain

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reentrant_checkpoint_is_refused(engine: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = gk.wrap(sgd(model), model=model, engine=engine)
    x = INPUT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(lambda: model[1](checkpoint(model[0], x, use_reentrant=True)).sum())
    optimizer.step(lambda: model[1](checkpoint(model[0], x, use_reentrant=False)).sum())
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_without_gradient_does_not_repeat_the_last_step(engine: str) -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model, engine=engine)
    optimizer.step(lambda: model(INPUT).sum())
    weights = plain(model.state_dict())
    with pytest.warns(UserWarning, match="produced no gradient"):
        optimizer.step(lambda: torch.zeros(()))
    assert not optimizer.last_step.applied
    assert plain(model.state_dict()) == weights
    # What the user adds to those gradients is the user's again.
    model(INPUT).sum().backward()
    assert optimizer.step(lambda: torch.zeros(())) == 0
    assert plain(model.state_dict()) != weights


OBJECTIVES = {
    "empty": ({}, ValueError, "mapping of objectives is empty"),
    "not a closure": (3, TypeError, "closure"),
    "loss, not closure": ({"a": torch.ones(())}, TypeError, "not a closure"),
    "name": ({1: lambda: torch.ones(())}, TypeError, "names are strings"),
    "vector": (lambda: torch.ones(3, requires_grad=True), ValueError, r"shape \(3,\)"),
    "a loss": (torch.ones(()), TypeError, "not a Tensor; pass a function that runs the model"),
    "a generator": ((x for x in ()), TypeError, "pass the generator function itself"),
    "number": (lambda: 3.0, TypeError, "returned a float"),
    "integer": (lambda: torch.ones((), dtype=torch.long), ValueError, "torch.int64"),
    "complex": (lambda: torch.ones((), dtype=torch.cfloat), ValueError, "torch.complex64"),
    "nested": ({"a": lambda: {"b": torch.ones(())}}, ValueError, "returned a mapping"),
    "empty mapping": (dict, ValueError, "empty mapping"),
    "empty generator": (
        {"a": lambda: (x for x in ()), "b": lambda: torch.ones(())},
        RuntimeError,
        "yielded nothing",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", OBJECTIVES)
def test_bad_objectives_change_nothing(case: str, engine: str) -> None:
    objectives, error, message = OBJECTIVES[case]
    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)
    before = plain([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    with as_users_run_it(), pytest.raises(error, match=message):
        optimizer.step(objectives)
    assert before == plain([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])


def test_names_that_change_within_a_step() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    names = iter(["a", "b"])
    with pytest.raises(ValueError, match="after 'a' in the same step"):
        optimizer.step(lambda: {next(names): model(INPUT).sum()})


def test_backward_with_several_losses() -> None:
    model = network()
    optimizer = gk.wrap(sgd(model), model=model)

    def closure():
        a, b = model(INPUT).sum(), model(INPUT).mean()
        (a + b).backward()
        return {"a": a, "b": b}

    with pytest.raises(RuntimeError, match="no longer be told apart"):
        optimizer.step(closure)
