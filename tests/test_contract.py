"""The optimizer contract over every transform, several bases and both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk

BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


class Momentum(gk.Transform):
    """A transform with everything a transform may keep: a vector, a number, random numbers."""

    sets_update = True

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.state["steps"] = 0
        self.state["share"] = 0.1

    def initial_vectors(self, layout):
        return {"mean": torch.zeros(layout.numel, dtype=layout.dtype)}

    def around(self, inner, context):
        noise = torch.rand((), generator=self.generator)

        def oracle(at=None, only=None):
            gradients = inner(at, only)
            mean = self.vectors["mean"]
            mean = mean.lerp(gradients.direction(), (0.5 + noise / 2).to(mean))
            context.propose(
                self, mean=mean, steps=self.state["steps"] + 1, share=self.state["share"] / 3
            )
            return gradients.replace(update=mean.clone())

        return oracle


CHAINS: dict[str, tuple[Callable[[nn.Module], tuple[gk.Transform, ...]], tuple[str, ...]]] = {
    "none": (lambda m: (), ("loss",)),
    "none-two": (lambda m: (), ("a", "b")),
    "pcgrad": (lambda m: (gk.PCGrad(),), ("a", "b", "c")),
    "pcgrad-tensor": (lambda m: (gk.PCGrad(scope="tensor"),), ("a", "b")),
    "sum": (lambda m: (gk.Sum(),), ("a", "b")),
    "mean": (lambda m: (gk.Mean(),), ("a", "b")),
    "sam": (lambda m: (gk.SAM(rho=0.1),), ("loss",)),
    "look-ahead": (lambda m: (gk.LookAhead(),), ("pseudo", "auxiliary")),
    "cosine-lr": (lambda m: (gk.CosineLR("a", "b"),), ("a", "b")),
    "ema": (lambda m: (gk.EMA(m, decay=0.9, warmup=True),), ("loss",)),
    "gated-ema": (lambda m: (gk.GatedEMA(m),), ("source", "target")),
    "grata": (
        lambda m: (gk.LookAhead(), gk.CosineLR(activation="linear")),
        ("pseudo", "auxiliary"),
    ),
    "pcgrad-sam-ema": (
        lambda m: (gk.PCGrad(), gk.SAM(), gk.EMA(m, decay=0.99)),
        ("a", "b", "c"),
    ),
    "own": (lambda m: (Momentum(),), ("a", "b")),
}


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """Types of arguments are checked in the tests of each method."""
    with as_users_run_it():
        yield


# Every chain meets both engines and two bases, and every base both engines in the longest chain:
# what a base keeps and what a transform keeps do not touch.
ENGINES = ("functional", "inplace")
CASES = {
    (chain, [*BASES][(2 * n + k) % len(BASES)], engine)
    for n, chain in enumerate(CHAINS)
    for k, engine in enumerate(ENGINES)
} | {("pcgrad-sam-ema", base, engine) for base in BASES for engine in ENGINES}


@pytest.mark.parametrize(("chain", "base", "engine"), sorted(CASES))
def test_contract(chain: str, base: str, engine: str) -> None:
    transforms, objectives = CHAINS[chain]
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(
            BASES[base](list(model.parameters())),
            *transforms(model),
            model=model,
            engine=engine,
        ),
        objectives,
    )
