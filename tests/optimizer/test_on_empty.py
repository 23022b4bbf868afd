"""Steps whose objectives leave nothing to step on, where the caller allows that."""

from __future__ import annotations

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk

ENGINES = ("inplace", "functional")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def nothing_yielded():
    yield from ()


EMPTY = {
    "None": lambda: None,
    "no micro-batch": nothing_yielded,
    "detached": lambda: torch.tensor(1.0),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("names", [("kept",), ("kept", "filtered")])
def test_an_empty_objective_skips_the_step(names, what, engine):
    model, x = network(), torch.randn(8, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = gk.wrap(
        base, gk.PCGrad(), gk.EMA(model, decay=0.9), model=model, engine=engine, on_empty="skip"
    )
    full = {name: lambda n=n: model(x)[:, n].square().mean() for n, name in enumerate(names)}
    optimizer.step(full)
    before = gk.testing.bits((model.state_dict(), optimizer.state_dict()))
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step({**full, names[-1]: EMPTY[what]})
    assert gk.testing.bits((model.state_dict(), optimizer.state_dict())) == before
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    record = optimizer.last_step
    assert not record.applied
    assert record.names == names
    assert record.losses.shape == record.weights.shape == (len(names),)
    optimizer.step(full)
    assert optimizer.last_step.applied


def test_by_default_it_is_an_error_that_names_the_objective():
    model, x = network(), torch.randn(8, 3)
    optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), model=model)
    with pytest.raises(gk.NoGradientError, match="'filtered'"):
        optimizer.step({"kept": lambda: model(x).mean(), "filtered": lambda: None})


def test_the_choice_is_checked():
    with (
        as_users_run_it(),
        pytest.raises(ValueError, match="on_empty is 'ignore'; choose one of raise, skip"),
    ):
        gk.wrap(torch.optim.SGD(network().parameters(), lr=0.1), on_empty="ignore")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_without_any_loss(engine):
    model, x = network(), torch.randn(8, 3)
    labelled = torch.tensor([True, False])

    def losses():
        return {str(n): model(x)[:, n].mean() for n in range(2) if labelled[n]}

    strict, lenient = (
        gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine, on_empty=choice
        )
        for choice in ("raise", "skip")
    )
    for optimizer in (strict, lenient):
        optimizer.step(losses)
    labelled[0] = False
    everything = (model.state_dict, strict.state_dict, lenient.state_dict)
    before = gk.testing.bits([part() for part in everything])
    with pytest.raises(ValueError, match=r"take no step .* or pass on_empty='skip' to gk.wrap"):
        strict.step(losses)
    assert lenient.step(losses) is None
    assert not lenient.last_step.applied
    assert gk.testing.bits([part() for part in everything]) == before


class Drawing(gk.Transform):
    """Draws noise in each step, and does nothing with it."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def around(self, inner, context):
        context.noise(self.generator)
        return inner


@pytest.mark.filterwarnings("ignore:step.. had nothing to step on")
@pytest.mark.parametrize("on_empty", ["skip", "raise"])
def test_a_transforms_draws_are_put_back(on_empty):
    model, drawing = network(), Drawing()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, drawing, model=model, on_empty=on_empty)
    before = drawing.generator.get_state()
    optimizer.step(lambda: None)  # with "raise" the base steps without gradients, as in torch
    assert not optimizer.last_step.applied
    assert torch.equal(drawing.generator.get_state(), before)
    optimizer.step(lambda: model(torch.randn(8, 3)).square().mean())
    assert not torch.equal(drawing.generator.get_state(), before)
