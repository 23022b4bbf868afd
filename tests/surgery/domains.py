"""Three domains that pull against each other, and plain arithmetic on lists of gradients."""

from __future__ import annotations

import torch
from helpers import Perceptron, explicit, flat, forward, seeded
from torch import Tensor

import gradkit as gk

ENGINES = ["functional", "inplace"]
FORMS = ["one by one", "jointly"]
NAMES = ("a", "b", "c")
INPUTS = torch.randn(3, 6, 3, generator=seeded(11), dtype=torch.float64)
TARGETS = 2 * torch.randn(3, 6, 4, generator=seeded(12), dtype=torch.float64)


def domain(k, t=0):
    """The loss of domain k in step t, as a function of the weights."""
    x, y = INPUTS[k] + 0.1 * t, TARGETS[k]
    return lambda *weights: (forward(x, *weights) - y).square().mean() * (k + 1)


def domains(t=0):
    return {name: domain(k, t) for k, name in enumerate(NAMES)}


def closures(model, losses, form="one by one"):
    """The losses as objectives of a model, in one of the forms that `step` takes."""
    if form == "one by one":
        return {name: lambda f=f: f(*model.parameters()) for name, f in losses.items()}
    return lambda: {name: f(*model.parameters()) for name, f in losses.items()}


def one_step(*transforms, losses=None, engine="functional", form="one by one"):
    """The direction of one step from the same start, the record, and the start."""
    model = Perceptron()
    start = explicit(model)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = gk.wrap(base, *transforms, model=model, engine=engine)
    optimizer.step(closures(model, losses or domains(), form))
    return flat(start) - flat(model.parameters()), optimizer.last_step, start


def grads(loss, weights):
    weights = [weight.detach().requires_grad_() for weight in weights]
    return list(torch.autograd.grad(loss(*weights), weights))


def add(a, b, factor=1.0):
    """a + factor·b, of lists of tensors."""
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def total(gradients):
    result = [torch.zeros_like(part) for part in gradients[0]]
    for gradient in gradients:
        result = add(result, gradient)
    return result


def scaled(a, factor):
    return [factor * x for x in a]


def hessian_product(loss, weights, v):
    """By differentiating twice."""
    weights = [weight.detach().requires_grad_() for weight in weights]
    gradient = torch.autograd.grad(loss(*weights), weights, create_graph=True)
    inner = sum((g * x).sum() for g, x in zip(gradient, v, strict=True))
    return list(torch.autograd.grad(inner, weights))


def times(loss, factor):
    return lambda *weights: factor * loss(*weights)


class Asks(gk.Transform):
    """Asks for some objectives only."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def around(self, inner, context):
        return lambda at=None, only=None: inner(at, self.names)


class Displaced(gk.Transform):
    """Takes everything at a fixed displacement."""

    def __init__(self, at: Tensor) -> None:
        self.at = at

    def around(self, inner, context):
        return lambda at=None, only=None: inner(self.at if at is None else at + self.at, only)


class Observers(gk.Transform):
    """Makes the named objectives observers, wherever they are asked for."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.observe(*(name for name in gradients.names if name in self.names))

        return oracle
