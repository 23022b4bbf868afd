"""Plain loops that other tools' runs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from helpers import length
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    """Two layers in float64 with BatchNorm between them."""
    torch.manual_seed(seed)
    layers = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    return nn.Sequential(*layers).double()


def data(count: int, size: int = 4) -> list[Batch]:
    """Inputs [size, 3] and targets [size, 2] in float64."""
    inputs = torch.linspace(-3, 3, count * size * 3, dtype=torch.float64).sin()
    targets = torch.linspace(0, 9, count * size * 2, dtype=torch.float64).cos()
    return list(zip(inputs.reshape(count, size, 3), targets.reshape(count, size, 2), strict=True))


def error(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def gradient(loss: Tensor, weights: Iterable[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(weights)))


def clipped(gradients: Sequence[Tensor], norm: float) -> list[Tensor]:
    factor = min(1.0, norm / (length(gradients) + 1e-6))
    return [factor * each for each in gradients]


@torch.no_grad()
def move(weights: Iterable[Tensor], factor: float, by: Sequence[Tensor]) -> None:
    for weight, direction in zip(weights, by, strict=True):
        weight += factor * direction


def sam(model: nn.Module, take: Callable[[], list[Tensor]], rho: float) -> list[Tensor]:
    """The gradient that SAM steps on; weights come back, buffers as the first pass left them."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    first = take()
    buffers = [buffer.clone() for buffer in model.buffers()]
    move(weights, rho / length(first), first)
    second = take()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return second


def pcgrad(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Each of two gradients without its part against the other, summed."""
    product = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    if product >= 0:
        return [x + y for x, y in zip(a, b, strict=True)]
    share_a, share_b = product / length(a) ** 2, product / length(b) ** 2
    return [(1 - share_a) * x + (1 - share_b) * y for x, y in zip(a, b, strict=True)]


def assert_close(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-10) -> None:
    """All weights and buffers of two modules, which are of the order of 1, agree."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = float((ours[name].double() - value.double()).abs().sum())
        assert difference <= tolerance, (name, difference)  # a NaN is not


def assert_equal(actual: nn.Module, expected: nn.Module) -> None:
    """All weights and buffers of two modules are the same, bit for bit."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
