"""Several steps of methods that pytorch-optimizer has, too, where its rule is the paper's.

Its norms are float32, which displaces by a relative 1e-7 more or less; all else is float64 here.

What is not compared, because version 4.1 has another rule:

- LookSAM takes norms and projections tensor by tensor; the two agree where there is one tensor.
- BSAM multiplies the gradient by the weight decay in the place of adding the decayed weights, draws
  noise with the standard deviation 1/(N·s), and squares the new scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer as peer
import torch
from helpers import flat, seeded
from torch import Tensor, nn

import gradkit as gk

LR, MOMENTUM, RHO = 0.05, 0.9, 0.2
Step = Callable[[Callable[[], Tensor]], None]


def network(layers: int = 2) -> nn.Module:
    torch.manual_seed(1)
    inner = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)] if layers == 2 else [nn.Linear(3, 2)]
    model = nn.Sequential(*inner).double()
    if layers == 1:
        model[0].bias = None
    return model


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(7, 3), draw(7, 2)) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).tanh() - y).square().mean()


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """As their optimizers take it."""

    def closure() -> Tensor:
        model.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return closure


def after_first(optimizer: Any) -> Step:
    """For those that expect the first gradient to be there."""

    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        optimizer.step(closure)

    return step


def their_gsam(model: nn.Module, **arguments: Any) -> Step:
    class Constant:
        def step(self) -> float:
            return RHO

    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    optimizer = peer.GSAM(
        model.parameters(), base, model=model, rho_scheduler=Constant(), **arguments
    )
    # It runs closures without gradients, and takes an output beside the loss.
    return lambda closure: optimizer.step(lambda: (None, torch.enable_grad()(closure)()))


def two_pass(kind: Any, **arguments: Any) -> Callable[[nn.Module], Step]:
    return lambda model: after_first(
        kind(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, **arguments)
    )


def their_wsam(model: nn.Module, **arguments: Any) -> Step:
    optimizer = peer.WSAM(
        model, model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, **arguments
    )
    return lambda closure: optimizer.step(closure)


def their_lookahead(model: nn.Module) -> Step:
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    optimizer = peer.Lookahead(base, k=3, alpha=0.4, pullback_momentum="none")

    def step(closure: Callable[[], Tensor]) -> None:
        closure()
        optimizer.step()

    return step


PAIRS: dict[str, tuple[Callable[[], gk.Transform], Callable[[nn.Module], Step]]] = {
    "SAM": (lambda: gk.SAM(rho=RHO), two_pass(peer.SAM)),
    "ASAM": (
        lambda: gk.ASAM(rho=RHO, adaptive="all", eta=0.0),
        two_pass(peer.SAM, adaptive=True),
    ),
    "GSAM": (lambda: gk.GSAM(rho=RHO, alpha=0.3), lambda model: their_gsam(model, alpha=0.3)),
    "GSAM, adaptive": (
        lambda: gk.GSAM(rho=RHO, alpha=0.3, adaptive="all", eta=0.0),
        lambda model: their_gsam(model, alpha=0.3, adaptive=True),
    ),
    "WSAM": (
        lambda: gk.WSAM(rho=RHO, gamma=0.7),
        lambda model: their_wsam(model, gamma=0.7),
    ),
    "WSAM, coupled": (
        lambda: gk.WSAM(rho=RHO, gamma=0.7, decouple=False),
        lambda model: their_wsam(model, gamma=0.7, decouple=False),
    ),
    "FriendlySAM": (
        lambda: gk.FriendlySAM(rho=RHO, sigma=0.8, lmbda=0.7),
        two_pass(peer.FriendlySAM, sigma=0.8, lmbda=0.7),
    ),
    "SlowWeights": (lambda: gk.SlowWeights(k=3, alpha=0.4), their_lookahead),
}


def wrapped(model: nn.Module, transform: gk.Transform) -> gk.GradientOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    return gk.wrap(base, transform, model=model)


def assert_same_way(ours: nn.Module, theirs: nn.Module, start: Tensor) -> None:
    moved, expected = flat(ours.parameters()) - start, flat(theirs.parameters()) - start
    assert float(expected.norm()) > 0.05
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_steps_equal_theirs(name: str) -> None:
    make, make_theirs = PAIRS[name]
    ours, theirs = network(), network()
    start = flat(ours.parameters())
    optimizer, step = wrapped(ours, make()), make_theirs(theirs)
    for x, y in batches(6):
        optimizer.step(lambda: loss_of(ours, x, y))
        step(closure_of(theirs, x, y))
    assert_same_way(ours, theirs, start)


def test_looksam_equals_theirs_on_one_tensor() -> None:
    ours, theirs = network(layers=1), network(layers=1)
    start = flat(ours.parameters())
    optimizer = wrapped(ours, gk.LookSAM(rho=RHO, k=3, alpha=0.6))
    step = two_pass(peer.LookSAM, k=3, alpha=0.6)(theirs)
    for x, y in batches(7):
        optimizer.step(lambda: loss_of(ours, x, y))
        step(closure_of(theirs, x, y))
    assert_same_way(ours, theirs, start)
