"""Random surroundings for a fault: network, optimizer, chain, form of the objectives, history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import gradkit as gk

Moment = Literal["before", "after", "end"]

ENGINES = ("functional", "inplace")
ONE = ("one", "one-generator", "one-backward")
EACH = ("mapping", "mapping-generator", "mapping-backward")
JOINT = ("joint", "joint-generator")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.RNN(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None])[0][:, -1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.4)),
    "tied": Tied,
    "recurrent": Recurrent,
}

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, centered=True, momentum=0.5),
    "adagrad": torch.optim.Adagrad,
}


class Own(gk.Transform):
    """A transform with everything that one may keep: a vector, numbers, random numbers."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.state.update(steps=0, share=0.1, matrix=torch.eye(2))

    def initial_vectors(self, layout):
        return {"mean": torch.zeros(layout.numel, dtype=layout.dtype)}

    def around(self, inner, context):
        noise = torch.rand((), generator=self.generator)

        def oracle(at=None, only=None):
            gradients = inner(at, only)
            mean = self.vectors["mean"].lerp(gradients.direction(), 0.5 + float(noise) / 2)
            context.propose(
                self,
                mean=mean,
                steps=self.state["steps"] + 1,
                share=self.state["share"] / 3,
                matrix=self.state["matrix"] * 1.5,
            )
            return gradients.replace(update=mean.clone())

        return oracle


CHAINS: dict[str, Callable[[nn.Module], tuple[gk.Transform, ...]]] = {
    "none": lambda m: (),
    "pcgrad": lambda m: (gk.PCGrad(),),
    "pcgrad-tensor": lambda m: (gk.PCGrad(scope="tensor"),),
    "sam": lambda m: (gk.SAM(rho=0.1),),
    "pcgrad-sam": lambda m: (gk.PCGrad(), gk.SAM(rho=0.1)),
    "grata": lambda m: (gk.LookAhead(), gk.CosineLR()),
    "gated": lambda m: (gk.GatedEMA(m),),
    "sam-ema": lambda m: (gk.SAM(rho=0.1), gk.EMA(m, decay=0.9, warmup=True)),
    "own": lambda m: (Own(),),
}

NAMES: dict[str, tuple[str, ...]] = {
    "none": ("a", "b"),
    "pcgrad": ("a", "b", "c"),
    "pcgrad-tensor": ("a", "b", "c"),
    "sam": ("a", "b"),
    "pcgrad-sam": ("a", "b", "c"),
    "grata": ("pseudo", "auxiliary"),
    "gated": ("source", "target", "other"),
    "sam-ema": ("a",),
    "own": ("a", "b"),
}
NEEDED = {"grata": ("pseudo", "auxiliary"), "gated": ("source", "target")}
"""The objectives without which a chain cannot work."""


@dataclass(frozen=True)
class Shape:
    """A chain, and the form in which it is given its objectives."""

    chain: str
    form: str

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss",) if self.form in ONE else NAMES[self.chain]

    @property
    def joint(self) -> bool:
        return self.form in JOINT

    @property
    def backward(self) -> bool:
        """Whether closures call backward themselves."""
        return self.form.endswith("backward")

    @property
    def visits(self) -> int:
        """How often each objective is computed in a step."""
        return 2 if "sam" in self.chain or (self.chain == "grata" and self.joint) else 1

    @property
    def places(self) -> list[tuple[str, int]]:
        """Each objective's each computation in a step."""
        return [(name, visit) for name in self.names for visit in range(self.visits)]

    @property
    def differentiated(self) -> list[tuple[str, int]]:
        """Those that are differentiated, too."""
        if self.chain == "grata" and self.joint:
            return [("auxiliary", 0), ("pseudo", 1)]
        return self.places


SHAPES = [
    Shape(chain, form)
    for chain in CHAINS
    for form in (*ONE, *EACH, *JOINT)
    if chain not in NEEDED or form not in ONE
]


@dataclass(frozen=True)
class Case:
    """Where a fault happens."""

    shape: Shape
    engine: str
    base: str
    network: str
    extras: bool
    groups: int
    dtype: torch.dtype
    tensor_lr: bool
    steps: int
    grads: str
    nonfinite: str
    max_norm: float | None
    replay_rng: bool
    victim: str
    visit: int
    moment: Moment
    choice: int
