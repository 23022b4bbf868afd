"""Matrices of gradients, steps and scopes that tests of several rules share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from helpers import Perceptron, batches, linear_objectives, quarters, seeded
from hypothesis import strategies as st
from torch import Tensor, nn

import gradkit as gk
from gradkit.surgery import GramRule

SIZES = (3, 1, 4, 2)
GROUPS = ((0, 2), (2, 4))


def step_with(rows, *transforms, sizes=SIZES, **options):
    """One step on objectives of the given gradients [K, P]; returns the direction, the record."""
    parameters = [nn.Parameter(torch.zeros(size, dtype=rows.dtype)) for size in sizes]
    groups = [{"params": parameters[start:stop]} for start, stop in GROUPS if start < len(sizes)]
    optimizer = gk.wrap(torch.optim.SGD(groups, lr=1.0), *transforms, **options)
    optimizer.step(linear_objectives(parameters, rows))
    direction = -torch.cat([parameter.detach() for parameter in parameters])
    return direction, optimizer.last_step


def in_blocks(rows: Tensor, scope: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function of gradients gives block by block."""
    sizes = {"global": (10,), "group": (4, 6), "tensor": SIZES}[scope]
    return torch.cat([function(part) for part in rows.split(sizes, dim=1)])


def gradients(number: int, least: int = 2, most: int = 5, seed: int = 0) -> Iterator[Tensor]:
    """Independent gradients in float64 that agree, conflict or differ in length."""
    generator = seeded(seed)
    for index in range(number):
        count = least + index % (most - least + 1)
        rows = torch.randn(count, 8, generator=generator, dtype=torch.float64)
        kind = index // (most - least + 1) % 4
        if kind == 1:
            rows -= 0.9 * rows.mean(0)
        elif kind == 2:
            rows += 2 * rows[0]
        elif kind == 3:
            rows *= 10 ** torch.randn(count, 1, generator=generator, dtype=torch.float64)
        yield rows


def dependent_gradients(number: int, seed: int = 0) -> Iterator[Tensor]:
    """Gradients with zero, equal, opposite, parallel or planar rows among them."""
    for index, rows in enumerate(gradients(number, least=3, seed=seed)):
        kind = index % 5
        if kind == 0:
            rows[1] = 0
        elif kind in (1, 2, 3):
            rows[2] = {1: 1.0, 2: -1.0, 3: 2.5}[kind] * rows[0]
        else:
            rows[2] = rows[0] - 0.5 * rows[1]
        yield rows


def directions(rule: GramRule, jacobians: list[Tensor]) -> list[Tensor]:
    """The rule's direction for each matrix; one batch for each number of gradients."""
    found: dict[int, Tensor] = {}
    for count in {len(jacobian) for jacobian in jacobians}:
        chosen = [k for k, jacobian in enumerate(jacobians) if len(jacobian) == count]
        rows = torch.stack([jacobians[k] for k in chosen])
        weights = rule.weights(rows @ rows.mT)
        found |= dict(zip(chosen, (weights[:, None] @ rows)[:, 0], strict=True))
    return [found[k] for k in range(len(jacobians))]


@st.composite
def independent_gradients(draw) -> Tensor:
    """Gradients in float64 that may conflict strongly, but are far from dependent."""
    count = draw(st.integers(2, 4))
    entries = st.lists(quarters, min_size=count + 1, max_size=count + 1)
    rows = torch.tensor([draw(entries) for _ in range(count)], dtype=torch.float64)
    rows[:, :count] += 24 * torch.eye(count)
    rows[:, count] *= 10
    lengths = draw(st.lists(st.sampled_from([0.1, 1.0, 5.0]), min_size=count, max_size=count))
    return rows * torch.tensor(lengths, dtype=torch.float64)[:, None]


def check_resumes(make: Callable[[], gk.Transform], steps: int = 6) -> None:
    """Check that training resumes bit for bit from the state saved in its middle."""

    def optimizer_of(model: nn.Module) -> gk.GradientOptimizer:
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        return gk.wrap(base, make(), gk.SAM(rho=0.01), model=model)

    def objectives(model, x, y):
        def error(part: int) -> Callable[[], Tensor]:
            return lambda: (model(x) - y)[:, part].square().mean() * (1 + part)

        return {name: error(part) for part, name in enumerate("abc")}

    model = Perceptron()
    optimizer = optimizer_of(model)
    data = list(batches(steps))
    for step, (x, y) in enumerate(data):
        if step == steps // 2:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.step(objectives(model, x, y))
    resumed = Perceptron(seed=5)
    second = optimizer_of(resumed)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for x, y in data[steps // 2 :]:
        second.step(objectives(resumed, x, y))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert str(optimizer.state_dict()) == str(second.state_dict())


def series(count, steps=10, width=6, seed=0):
    generator = seeded(seed)
    return [
        torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(steps)
    ]


def matrices():
    """200 random and structured gradients at unit scale."""
    generator = seeded(0)
    found = []
    for number in range(200):
        count = 2 + number % 7
        width = (3, 10, 40)[number % 3]
        matrix = torch.randn(count, width, generator=generator, dtype=torch.float64)
        kind = number % 5
        if kind == 1:  # conflict: all lie near one line
            line = torch.randn(width, generator=generator, dtype=torch.float64)
            matrix = 0.3 * matrix + torch.randn(count, 1, generator=generator).double() * line
        if kind == 2:  # linearly dependent
            matrix[-1] = 0.5 * matrix[0] + 0.25 * matrix[1]
        if kind == 3:
            matrix = matrix.abs()
        if kind == 4:
            matrix *= torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]
        found.append(matrix / matrix.norm(dim=1).mean())
    return found


def min_norm(matrix):
    return float((gk.MGDA()(matrix)).norm())
