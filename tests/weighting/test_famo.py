"""FAMO; what holds of every weighting is in test_loss_weighting.py."""

import copy
import math

import pytest
import torch
from helpers import Perceptron, flat, relative_error

import gradkit as gk
from weighting import references
from weighting.references import batches, objectives, wrapped
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


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_updated_after_every_step_it_is_the_authors_loop_on_any_batches(rho):
    model, famo = Perceptron(), gk.FAMO(lr=0.3)
    optimizer = wrapped(model, famo, *([gk.SAM(rho=rho)] if rho else []))
    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.3, weight_decay=1e-3)

    def logs(x, y, at):
        return (references.losses_of(references.forward(x, *at), y) + 1e-8).log()

    def gradient(x, y, at):
        z, found = xi.detach().softmax(0), logs(x, y, at)
        scalar = (z * found).sum() / (z / found.detach().exp()).sum()
        return torch.autograd.grad(scalar, at)

    for step, (x, y) in enumerate(batches(12)):
        if step == 7:  # all that was learnt is saved
            saved = copy.deepcopy(optimizer.state_dict())
            famo = gk.FAMO(lr=0.3)
            optimizer = wrapped(model, famo, *([gk.SAM(rho=rho)] if rho else []))
            optimizer.load_state_dict(saved)
        before, found = logs(x, y, weights).detach(), gradient(x, y, weights)
        if rho:
            pairs = zip(weights, found, strict=True)
            there = [weight + rho / flat(found).norm() * part for weight, part in pairs]
            found = gradient(x, y, [weight.detach().requires_grad_() for weight in there])
        with torch.no_grad():
            for weight, part in zip(weights, found, strict=True):
                weight -= 0.05 * part
        (xi.grad,) = torch.autograd.grad(
            xi.softmax(0), xi, grad_outputs=before - logs(x, y, weights).detach()
        )
        adam.step()
        optimizer.step(objectives(model, x, y))
        with torch.no_grad():
            famo.update({name: each() for name, each in objectives(model, x, y).items()})
        torch.testing.assert_close(famo.state["xi"], xi.detach())
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-10
    assert float(xi.detach().max() - xi.detach().min()) > 0.2


def test_only_what_the_last_step_has_done_is_learnt():
    parameter, famo = torch.nn.Parameter(torch.zeros(())), gk.FAMO(lr=0.1)
    base = torch.optim.SGD([parameter], lr=0.0)
    optimizer = gk.wrap(base, famo, nonfinite="skip")

    def step(**losses):
        optimizer.step({name: lambda loss=loss: parameter + loss for name, loss in losses.items()})
        return famo.state["xi"].tolist()

    assert step(a=1.0, b=2.0) == [0, 0]
    famo.update({"a": torch.tensor(0.5), "b": 2})
    learnt = famo.state["xi"].tolist()
    assert learnt == pytest.approx([-0.1, 0.1])
    famo.update({"a": 0.1, "b": 2})  # there has been no further step
    assert famo.state["xi"].tolist() == learnt
    assert step(a=math.nan, b=2.0) == learnt
    assert not optimizer.last_step.applied
    famo.update({"a": 0.1, "b": 2})
    assert famo.state["xi"].tolist() == learnt
    assert step(a=0.5, b=2.0) == learnt  # which has been learnt
    assert step(a=0.1, b=2.0) != learnt  # which has not


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ({"a": 0.5, "c": 1.0}, "no step with the objective 'c'"),
        ({"a": 0.5, "b": -1.0}, r"takes no losses below min_losses.* 'b' is -1"),
        ({"a": math.nan, "b": 1.0}, "'a' is nan"),
        ({"a": math.inf, "b": 1.0}, "'a' is inf"),
    ],
    ids=["unknown", "negative", "nan", "inf"],
)
def test_losses_that_cannot_be_learnt_from_change_nothing(losses, problem):
    parameter, famo = torch.nn.Parameter(torch.zeros(())), gk.FAMO()
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=0.0), famo)
    optimizer.step({"a": lambda: parameter + 1, "b": lambda: parameter + 2})
    before = gk.testing.bits(optimizer.state_dict())
    with pytest.raises(ValueError, match=problem):
        famo.update(losses)
    assert gk.testing.bits(optimizer.state_dict()) == before
