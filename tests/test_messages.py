"""What a newcomer does at first, and what the error says to do instead."""

import pytest
import torch
from helpers import as_users_run_it
from torch import nn
from torchjd.aggregation import UPGrad as TorchjdUPGrad

import gradkit as gk


def problem(*transforms, **options):
    model = nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, gk.wrap(base, *transforms, model=model, **options), torch.ones(4, 3)


def test_losses_need_names():
    model, optimizer, x = problem(gk.PCGrad())
    first, second = (lambda k=k: model(x)[:, k].mean() for k in range(2))
    with as_users_run_it():
        with pytest.raises(TypeError, match=r'not a list; give each .*step\(\{"a": first'):
            optimizer.step([first, second])
        with pytest.raises(TypeError, match="returned a list; return one loss as a tensor, or sev"):
            optimizer.step(lambda: [first(), second()])
        with pytest.raises(TypeError, match=r"objective 'a' is a Tensor.*runs the model"):
            optimizer.step({"a": first(), "b": second()})


def test_no_loss():
    model, optimizer, x = problem(gk.PCGrad())

    def forgets_to_return():
        model(x).mean()

    with pytest.warns(UserWarning, match=r"the loss is None.*is there a return\?\)"):
        optimizer.step(forgets_to_return)
    for nothing, why in ((None, "the loss is None"), (torch.tensor(0.0), "does not depend on any")):
        with pytest.raises(gk.NoGradientError, match=f"{why}.*leave out an objective that has no"):
            optimizer.step(lambda nothing=nothing: {"a": model(x).mean(), "b": nothing})


def test_transforms_of_other_kinds():
    with as_users_run_it():
        with pytest.raises(TypeError, match=r"UPGrad; pass gradkit .*as gk.Aggregate\(\.\.\.\)"):
            problem(TorchjdUPGrad())
        with pytest.raises(TypeError, match=r"gk.wrap\(base, \*transforms\)"):
            problem([gk.PCGrad(), gk.SAM()])


def test_a_main_objective_that_is_absent():
    model, optimizer, x = problem(gk.CosineGate(main="seg"))

    def closures(*names):
        return {name: (lambda k=k: model(x)[:, k].mean()) for k, name in enumerate(names)}

    with pytest.raises(ValueError, match=r"no objective 'seg'; there are 'a', 'b'.*main objective"):
        optimizer.step(closures("a", "b"))


def test_numbers_for_objectives_that_may_be_absent():
    model, optimizer, x = problem(gk.UPGrad(preference=[1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="or a mapping from names where some may be absent"):
        optimizer.step({"a": lambda: model(x)[:, 0].mean(), "b": lambda: model(x)[:, 1].mean()})


def test_losses_that_a_method_cannot_work_with_are_named():
    model, optimizer, x = problem(gk.DBMTL())

    def closure():
        a, b = model(x).mean(0)
        return {"fine": a - a.detach() + 1, "bad": b - b.detach() - 1}

    with pytest.raises(gk.NonFiniteError, match="and that of objective 'bad' is"):
        optimizer.step(closure)


class OnlyOneByOne(torch.autograd.Function):
    """Its backward looks at numbers."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy() * 2)


def test_what_cannot_be_batched_says_what_to_do():
    model, optimizer, x = problem(gk.PCGrad(), rows="stream")

    def closure():
        a, b = OnlyOneByOne.apply(model(x)).mean(0)
        return {"a": a, "b": b}

    with pytest.raises(RuntimeError, match="pass rows='keep'"):
        optimizer.step(closure)
