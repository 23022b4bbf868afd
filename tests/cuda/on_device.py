"""What the tests on a CUDA device share: the device, a small network, a short training."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import simulated
import torch
from torch import Tensor, nn

import gradkit as gk
from gradkit.surgery import ElementwiseRule

NAME = os.environ.get("GRADKIT_TEST_DEVICE", "cuda")
"""Another device than cuda, such as cpu or simulated, is for machines that have none."""
SIMULATED = simulated.start() if NAME == simulated.NAME else None
DEVICE = torch.device(NAME)
CPU = torch.device("cpu")
ENGINES = ["functional", "inplace"]
NAMES = ("source", "target", "third")

CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"
    ),
]
"""The marks of a module that runs on the device."""
NOT_SIMULATED = pytest.mark.skipif(
    SIMULATED is not None, reason="the simulated device has neither a compiler nor collectives"
)
CUDA_ONLY = pytest.mark.skipif(
    DEVICE.type != "cuda", reason=f"looks at what only CUDA has, and the device is {NAME}"
)

Batch = tuple[Tensor, Tensor]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers with BatchNorm between them, on the CPU; always with the same weights."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    return nn.Sequential(*layers).to(dtype)


def batches(
    count: int, where: torch.device = DEVICE, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Inputs [8, 5] and targets [8, 3]."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64).to(where, dtype),
            torch.randn(8, 3, generator=generator, dtype=torch.float64).to(where, dtype),
        )
        for _ in range(count)
    ]


def losses(model: nn.Module, batch: Batch, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    """Objectives that pull the same outputs different ways."""
    a, b, c = model(batch[0]).unbind(1)
    x, y, z = batch[1].unbind(1)
    found = [(a - x).square().mean(), (a + b - y).square().mean(), (c - a - z).square().mean()]
    return dict(zip(names, found, strict=False))


def sgd(parameters: list[nn.Parameter], momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=momentum)


Chain = Callable[[nn.Module], tuple[gk.Transform, ...]]
Base = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Run:
    """What a training has come to, on the CPU.

    Attributes:
        model: The trained network.
        optimizer: Its optimizer.
        numbers: Everything that two runs must agree on, by name.
    """

    model: nn.Module
    optimizer: gk.GradientOptimizer
    numbers: dict[str, Tensor] = field(default_factory=dict)


def train(
    chain: Chain,
    *,
    where: torch.device = DEVICE,
    dtype: torch.dtype = torch.float64,
    engine: str = "inplace",
    base: Base = sgd,
    names: Sequence[str] = NAMES,
    steps: int = 4,
    joint: bool = True,
    **options: Any,
) -> Run:
    """Train for some steps, with one closure for all objectives or one for each."""
    model = network(dtype).to(where)
    optimizer = gk.wrap(
        base(list(model.parameters())), *chain(model), model=model, engine=engine, **options
    )
    run = Run(model, optimizer)
    for number, batch in enumerate(batches(steps, where, dtype)):

        def closure(batch: Batch = batch) -> dict[str, Tensor]:
            return losses(model, batch, names)

        each = {name: lambda name=name, c=closure: c()[name] for name in names}
        loss = optimizer.step(closure if joint else each)
        record = optimizer.last_step
        run.numbers[f"loss {number}"] = loss
        run.numbers[f"losses {number}"] = record.losses
        run.numbers[f"gram {number}"] = record.gram
        run.numbers[f"weights {number}"] = record.weights
        run.numbers[f"lr_scale {number}"] = record.lr_scale
    run.numbers |= {f"model {key}": value for key, value in model.state_dict().items()}
    for t, parameter in enumerate(model.parameters()):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                run.numbers[f"state {t} {key}"] = value
    run.numbers = {key: value.detach().cpu() for key, value in run.numbers.items()}
    return run


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """All numbers agree, relative to the largest of each tensor."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        found, wanted = actual[key].double(), value.double()
        assert found.shape == wanted.shape, key
        assert torch.equal(found.isnan(), wanted.isnan()), key
        scale = max(float(wanted.nan_to_num().abs().max()), 1e-3) if wanted.numel() else 1.0
        error = float((found - wanted).nan_to_num().abs().max()) / scale if found.numel() else 0.0
        assert error <= tolerance, (key, error)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All numbers are the same, bit for bit."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value) or bool(value.isnan().all()), key


# Every method that gradkit exports.

ARGUMENTS: dict[str, Chain] = {
    "Aggregate": lambda model: (gk.Aggregate(lambda rows: rows.mean(0)),),
    "BSAM": lambda model: (gk.BSAM(num_data=100),),
    "Constant": lambda model: (gk.Constant([0.5, 1.0, 2.0]),),
    "CosineLR": lambda model: (gk.CosineLR("source", "target"),),
    "EMA": lambda model: (gk.EMA(model, decay=0.9),),
    "ESAM": lambda model: (gk.ESAM(gamma=1.0),),  # less needs losses per sample
    "GatedEMA": lambda model: (gk.GatedEMA(model, between=("source", "target")),),
    "LookAhead": lambda model: (gk.LookAhead("source", "target"),),
}
"""How to make those that must be told something."""
WITHOUT_MOMENTUM = {"BSAM"}
"""Those that refuse a base optimizer with momentum."""
DRAWS_ON_DEVICE = {"BSAM"}
"""Those whose random numbers come from the device, beside elementwise rules with noise."""


def is_method(kind: object) -> bool:
    is_transform = inspect.isclass(kind) and issubclass(kind, gk.Transform)
    return is_transform and kind is not gk.Transform and not inspect.isabstract(kind)


METHODS = [name for name in sorted(gk.__all__) if is_method(getattr(gk, name))]
"""The names of all transforms that gradkit exports."""


def chain_of(name: str) -> Chain:
    """A chain of one exported transform."""
    return ARGUMENTS.get(name, lambda model: (getattr(gk, name)(),))


def draws_on_device(name: str) -> bool:
    kind = getattr(gk, name)
    noisy = issubclass(kind, ElementwiseRule) and getattr(kind, "noise", None) is not None
    return noisy or name in DRAWS_ON_DEVICE
