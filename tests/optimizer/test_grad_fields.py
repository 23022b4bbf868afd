"""Gradients of parameters that the optimizer does not hold, such as heads, are the closures'."""

import copy

import pytest
import torch
from torch import nn

import gradkit as gk

ENGINES = ("functional", "inplace")
each_engine = pytest.mark.parametrize("engine", ENGINES)


def problem(engine, *transforms, frozen=False):
    torch.manual_seed(0)
    trunk, head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    head.requires_grad_(not frozen)
    base = torch.optim.SGD(trunk.parameters(), lr=0.0)
    model = nn.Sequential(trunk, head)
    optimizer = gk.wrap(base, *transforms, model=model, engine=engine)
    x = torch.randn(6, 3, dtype=torch.float64)
    return model, head, optimizer, x


def losses(model, x):
    y = model(x)
    return {"a": y[:, 0].square().mean(), "b": y[:, 1].mean()}


def head_gradient(model, x):
    return torch.autograd.grad(sum(losses(model, x).values()), model[1].weight)[0]


@each_engine
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_clears_them_finds_no_old_ones(engine, set_to_none):
    model, head, optimizer, x = problem(engine, gk.PCGrad())
    expected = head_gradient(model, x)

    def closure():
        head.zero_grad(set_to_none=set_to_none)
        found = losses(model, x)
        sum(found.values()).backward(inputs=list(head.parameters()), retain_graph=True)
        return found

    for _ in range(3):
        optimizer.step(closure)
        torch.testing.assert_close(head.weight.grad, expected)


@each_engine
def test_a_closure_may_set_them(engine):
    model, head, optimizer, x = problem(engine, gk.PCGrad())
    wanted = torch.ones_like(head.weight)

    def closure():
        head.weight.grad = wanted
        return losses(model, x)

    for _ in range(2):
        optimizer.step(closure)
        assert head.weight.grad is wanted
        assert torch.equal(wanted, torch.ones_like(wanted))


@each_engine
def test_a_closure_that_does_not_clear_them_adds_to_them(engine):
    model, head, optimizer, x = problem(engine)
    expected = head_gradient(model, x)

    def closure():
        optimizer.zero_grad()
        loss = sum(losses(model, x).values())
        loss.backward()
        return loss

    for count in (1, 2, 3):
        optimizer.step(closure)
        torch.testing.assert_close(head.weight.grad, count * expected)


@each_engine
def test_two_optimizers_train_a_trunk_and_its_heads(engine):
    """Heads' own gradients inside the closure, an optimizer for each, beside the same by hand."""
    model, head, _, x = problem(engine)
    twin = copy.deepcopy(model)
    trunk_base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer = gk.wrap(trunk_base, gk.MGDA(), model=model, engine=engine)
    own = torch.optim.Adam(head.parameters(), lr=0.1)

    def closure():
        own.zero_grad()
        found = losses(model, x)
        sum(found.values()).backward(inputs=list(head.parameters()), retain_graph=True)
        return found

    bases = (
        torch.optim.SGD(twin[0].parameters(), lr=0.1),
        torch.optim.Adam(twin[1].parameters(), 0.1),
    )
    for _ in range(4):
        optimizer.step(closure)
        own.step()
        found = losses(twin, x)
        rows = [
            torch.autograd.grad(loss, list(twin[0].parameters()), retain_graph=True)
            for loss in found.values()
        ]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        heads = torch.autograd.grad(sum(found.values()), list(twin[1].parameters()))
        joined = gk.MGDA()(jacobian).split([p.numel() for p in twin[0].parameters()])
        for parameter, grad in zip(twin[0].parameters(), joined, strict=True):
            parameter.grad = grad.view_as(parameter)
        for parameter, grad in zip(twin[1].parameters(), heads, strict=True):
            parameter.grad = grad
        for base in bases:
            base.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_engine
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", ["clears", "zeroes", "adds", "replaces"])
def test_a_failed_step_leaves_them_as_they_were(engine, frozen, what):
    model, head, optimizer, x = problem(engine, gk.PCGrad(), gk.SAM(), frozen=frozen)
    before = head.weight.grad = torch.full_like(head.weight, 3.0)
    assert head.bias.grad is None
    calls = []

    def closure():
        if what == "clears":
            head.zero_grad()
        elif what == "zeroes":
            head.zero_grad(set_to_none=False)
        elif what == "adds":
            head.weight.grad.add_(1.0)
        else:
            head.weight.grad = torch.zeros_like(head.weight)
        head.bias.grad = torch.ones_like(head.bias)
        calls.append(what)
        if len(calls) == 2:
            raise KeyError("the second evaluation")
        return losses(model, x)

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert head.weight.grad is before
    assert torch.equal(before, torch.full_like(before, 3.0))
    assert head.bias.grad is None


@each_engine
def test_a_head_that_is_unfrozen_later_is_put_back_too(engine):
    model, head, optimizer, x = problem(engine, gk.PCGrad(), frozen=True)
    optimizer.step(lambda: losses(model, x))
    head.requires_grad_(True)
    before = head.weight.grad = torch.full_like(head.weight, 3.0)

    def closure():
        head.weight.grad.data.add_(1.0)  # which its version does not show
        raise KeyError("after it")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert head.weight.grad is before
    assert torch.equal(before, torch.full_like(before, 3.0))


@each_engine
def test_two_wrapped_optimizers_take_turns_after_a_failure(engine):
    """What the other one's step left in `.grad` is still known to be no accumulated gradient."""
    model, head, optimizer, x = problem(engine, gk.PCGrad())
    own = gk.wrap(torch.optim.SGD(head.parameters(), lr=0.1), model=model, engine=engine)
    optimizer.step(lambda: losses(model, x))

    def fails():
        model.zero_grad(set_to_none=False)
        raise KeyError("after it")

    def calls_backward():
        loss = losses(model, x)["a"]
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        own.step(fails)
    optimizer.step(calls_backward)  # without clearing what a step has left
    assert optimizer.last_step.applied


@each_engine
def test_looking_at_gradients_leaves_them_as_they_were(engine):
    model, head, optimizer, x = problem(engine)
    before = head.weight.grad = torch.full_like(head.weight, 3.0)

    def closure():
        head.weight.grad.add_(1.0)
        return losses(model, x)

    optimizer.gradients(closure)
    assert head.weight.grad is before
    assert torch.equal(before, torch.full_like(before, 3.0))
