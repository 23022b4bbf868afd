"""Problems and plain reference arithmetic that several test modules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gradkit.core.transform import Transform

# GS-EMA's own example: the raw gradients conflict, their signs agree.
CONFLICT = ((-4.0, 1.0, 1.0), (6.0, 1.0, 1.0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def as_users_run_it() -> Iterator[None]:
    """Without the test run's type checks, which catch wrong arguments before gradkit does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of the tensors, in order, as one detached copy."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected number."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    difference = float((actual.double() - expected.double()).abs().max())
    assert math.isfinite(difference)
    return difference / max(float(expected.double().abs().max()), 1e-300)


def linear_objectives(
    where: nn.Module | Sequence[Tensor], rows: Tensor, names: str = "abcdefgh"
) -> dict[str, Callable[[], Tensor]]:
    """Objectives whose gradients are the given rows [K, P], wherever they are taken."""

    def weights() -> list[Tensor]:
        return list(where.parameters()) if isinstance(where, nn.Module) else list(where)

    sizes = [weight.numel() for weight in weights()]

    def objective(row: Tensor) -> Callable[[], Tensor]:
        return lambda: sum(
            (weight.reshape(-1) * part).sum()
            for weight, part in zip(weights(), row.split(sizes), strict=True)
        )

    return {name: objective(row) for name, row in zip(names, rows)}  # noqa: B905 # more names


class Weighted(Transform):
    """Multiplies the objectives' weights by fixed numbers."""

    def __init__(self, **factors: float) -> None:
        self.factors = factors

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            factors = [self.factors.get(name, 1.0) for name in gradients.names]
            weights = gradients.weights * torch.tensor(factors).to(gradients.weights)
            return gradients.replace(weights=weights)

        return oracle


class Observed(Transform):
    """Makes the named objectives observers."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def around(self, inner, context):
        return lambda at=None, only=None: inner(at, only).observe(*self.names)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, counts):
        ctx.counts = counts
        counts["forward"] += 1
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.counts["backward"] += 1
        return gradient, None


def counted(value: Tensor, counts: dict[str, int]) -> Tensor:
    """The value itself; counts how often it is computed and differentiated."""
    return _Counted.apply(value, counts)


class ReferenceSGD:
    """Gradient descent with heavy-ball momentum, from its textbook definition."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float = 0.0) -> None:
        self.weights = weights
        self.lr = lr
        self.momentum = momentum
        self.velocity = [torch.zeros_like(weight) for weight in weights]

    def step(self, gradients: Sequence[Tensor], scale: float = 1.0) -> None:
        for weight, velocity, gradient in zip(self.weights, self.velocity, gradients, strict=True):
            velocity.copy_(self.momentum * velocity + gradient)
            weight.data = weight.data - self.lr * scale * velocity


class ReferenceAdam:
    """Adam from Kingma & Ba's Algorithm 1."""

    def __init__(
        self,
        weights: list[Tensor],
        lr: float | Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.weights = weights
        self.lr = [lr] * len(weights) if isinstance(lr, float) else list(lr)
        self.betas = betas
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]
        self.t = 0

    def step(self, gradients: Sequence[Tensor], scale: float = 1.0) -> None:
        self.t += 1
        b1, b2 = self.betas
        for i, gradient in enumerate(gradients):
            self.first[i] = b1 * self.first[i] + (1 - b1) * gradient
            self.second[i] = b2 * self.second[i] + (1 - b2) * gradient * gradient
            m = self.first[i] / (1 - b1**self.t)
            v = self.second[i] / (1 - b2**self.t)
            update = self.lr[i] * scale * m / (v.sqrt() + 1e-8)
            self.weights[i].data = self.weights[i].data - update


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def length(a: Sequence[Tensor]) -> float:
    return math.sqrt(dot(a, a))


class Perceptron(nn.Module):
    """Two layers in float64 whose forward can also be called on explicit weights."""

    def __init__(self, seed: int = 0, inputs: int = 3, hidden: int = 5, outputs: int = 4) -> None:
        super().__init__()
        generator = seeded(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2)

        self.w1, self.b1 = normal(inputs, hidden), normal(hidden)
        self.w2, self.b2 = normal(hidden, outputs), normal(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return forward(x, self.w1, self.b1, self.w2, self.b2)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return torch.tanh(x @ w1 + b1) @ w2 + b2


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def batches(count: int, seed: int = 1, outputs: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [6, 3] and targets [6, outputs] in float64."""
    generator = seeded(seed)
    for _ in range(count):
        yield (
            torch.randn(6, 3, generator=generator, dtype=torch.float64),
            torch.randn(6, outputs, generator=generator, dtype=torch.float64),
        )


def explicit(model: Perceptron) -> list[Tensor]:
    """The model's weights as tensors of their own, for a reference to work on."""
    return [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]


def displaced(weights: Sequence[Tensor], factor: float, by: Sequence[Tensor]) -> list[Tensor]:
    return [
        (weight.detach() + factor * direction).requires_grad_()
        for weight, direction in zip(weights, by, strict=True)
    ]


quarters = st.integers(-16, 16).map(lambda number: number / 4)
"""Exactly representable numbers, so that zero products are zero."""


@st.composite
def jacobians(draw, minimum: int = 2, maximum: int = 6) -> Tensor:
    """Gradients [K, P] in float64, with zero, equal, opposite and parallel rows among them."""
    count = draw(st.integers(minimum, maximum))
    width = draw(st.integers(1, 5))
    rows: list[list[float]] = []
    for _ in range(count):
        kind = draw(st.sampled_from(["new", "new", "new", "zero", "equal", "opposite", "parallel"]))
        if kind == "zero":
            rows.append([0.0] * width)
        elif kind == "new" or not rows:
            rows.append(draw(st.lists(quarters, min_size=width, max_size=width)))
        else:
            factor = {"equal": 1.0, "opposite": -1.0, "parallel": -2.5}[kind]
            rows.append([factor * number for number in draw(st.sampled_from(rows))])
    return torch.tensor(rows, dtype=torch.float64)


def complaint_of(capsys: Any, main: Callable[[list[str]], int], *words: object) -> str:
    """The one line that a command with bad input leaves on standard error, with exit status 2."""
    capsys.readouterr()
    try:
        status: Any = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert status == 2, output.err
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return str(output.err)
