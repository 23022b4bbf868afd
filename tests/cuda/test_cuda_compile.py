"""Compiled models on the device, with the default backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from on_device import (
    CUDA,
    DEVICE,
    NOT_SIMULATED,
    Chain,
    assert_close,
    assert_equal,
    batches,
    losses,
    network,
    sgd,
)
from torch import Tensor, nn

import gradkit as gk

pytestmark = [
    *CUDA,
    NOT_SIMULATED,
    # The compiler's own: its modules are loaded when something is first compiled.
    pytest.mark.filterwarnings("default"),
]

BACKEND = os.environ.get("GRADKIT_TEST_BACKEND", "inductor")
CHAINS: dict[str, Chain] = {
    "SAM": lambda model: (gk.SAM(rho=0.1),),
    "PCGrad+SAM": lambda model: (gk.PCGrad(), gk.SAM(rho=0.1)),
}
F32 = torch.float32


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(
    chain: str, forms: Callable[[nn.Module, tuple[Tensor, Tensor]], object], compiled: bool
) -> dict[str, Tensor]:
    model = network(F32).to(DEVICE)
    runs = torch.compile(model, backend=BACKEND) if compiled else model
    optimizer = gk.wrap(
        sgd([*model.parameters()]), *CHAINS[chain](model), model=runs, engine="inplace"
    )
    for batch in batches(3, dtype=F32):
        optimizer.step(forms(runs, batch))
    return dict(model.state_dict())


def jointly(model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
    return lambda: losses(model, batch)


def one_by_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
    return {name: lambda name=name: losses(model, batch)[name] for name in ("source", "target")}


def alone(model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
    return lambda: losses(model, batch)["source"]


@pytest.mark.parametrize(
    ("chain", "forms"),
    [("SAM", alone), ("PCGrad+SAM", one_by_one)],
    ids=["SAM", "PCGrad+SAM, a forward for each objective"],
)
def test_a_compiled_model_trains_as_the_model(
    chain: str, forms: Callable[[nn.Module, tuple[Tensor, Tensor]], object]
) -> None:
    assert_close(trained(chain, forms, True), trained(chain, forms, False), 2e-3)


@contextmanager
def donated_buffers(allowed: bool) -> Iterator[None]:
    """Whether a compiled backward pass may reuse what the forward has kept for it."""
    config = torch._functorch.config
    before = config.donated_buffer
    config.donated_buffer = allowed
    try:
        yield
    finally:
        config.donated_buffer = before


def test_several_objectives_of_one_compiled_forward() -> None:
    with donated_buffers(False):
        found = trained("PCGrad+SAM", jointly, True)
    assert_close(found, trained("PCGrad+SAM", jointly, False), 2e-3)


def test_donated_buffers_are_explained() -> None:
    model = network(F32).to(DEVICE)
    compiled = torch.compile(model, backend=BACKEND)
    optimizer = gk.wrap(sgd([*model.parameters()]), gk.PCGrad(), model=compiled, engine="inplace")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (batch,) = batches(1, dtype=F32)
    with (
        donated_buffers(True),
        pytest.raises(RuntimeError, match=r"donated_buffer = False before .* is compiled"),
    ):
        optimizer.step(lambda: losses(compiled, batch))
    assert_equal(dict(model.state_dict()), before)


def test_the_losses_are_compiled_with_the_model() -> None:
    model = network(F32).to(DEVICE)
    optimizer = gk.wrap(sgd([*model.parameters()]), gk.PCGrad(), model=model, engine="inplace")
    compiled = torch.compile(lambda x, y: losses(model, (x, y)), backend=BACKEND)
    twin = network(F32).to(DEVICE)
    other = gk.wrap(sgd([*twin.parameters()]), gk.PCGrad(), model=twin, engine="inplace")
    for x, y in batches(3, dtype=F32):
        optimizer.step(lambda x=x, y=y: compiled(x, y))
        other.step(lambda x=x, y=y: losses(twin, (x, y)))
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), 2e-3)
