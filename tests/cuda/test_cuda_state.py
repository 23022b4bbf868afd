"""Checkpoints and random numbers on the device."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from on_device import (
    CUDA,
    DEVICE,
    ENGINES,
    Base,
    Chain,
    assert_equal,
    batches,
    losses,
    network,
    sgd,
)
from torch import Tensor, nn
from torch.amp import GradScaler

import gradkit as gk

pytestmark = CUDA


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, capturable=DEVICE.type == "cuda")


CHAINS: dict[str, tuple[Chain, Base]] = {
    "PCGrad+SAM": (lambda model: (gk.PCGrad(), gk.SAM(rho=0.1)), sgd),
    "PCGrad, Adam": (lambda model: (gk.PCGrad(),), adam),
    "UW": (lambda model: (gk.UW(),), sgd),
    "GradNorm": (lambda model: (gk.GradNorm(),), adam),
    "CRMOGM": (lambda model: (gk.CRMOGM(),), sgd),
    "DBMTL": (lambda model: (gk.DBMTL(),), sgd),
    "GradDrop": (lambda model: (gk.GradDrop(),), sgd),
}


def made(chain: str, engine: str) -> tuple[nn.Module, gk.GradientOptimizer, GradScaler]:
    model = network(torch.float32).to(DEVICE)
    make, base = CHAINS[chain]
    scaler = GradScaler(DEVICE.type, init_scale=2.0**8, growth_interval=2)
    optimizer = gk.wrap(
        base([*model.parameters()]), *make(model), model=model, engine=engine, scaler=scaler
    )
    return model, optimizer, scaler


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chain", CHAINS)
def test_resuming_is_bit_exact(chain: str, engine: str) -> None:
    data = batches(6, dtype=torch.float32)
    model, optimizer, scaler = made(chain, engine)
    for batch in data[:3]:
        optimizer.step(lambda batch=batch: losses(model, batch))
    file = io.BytesIO()
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    torch.save({key: value.state_dict() for key, value in state.items()}, file)
    file.seek(0)
    other, resumed, its_scaler = made(chain, engine)
    saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    its_scaler.load_state_dict(saved["scaler"])
    for batch in data[3:]:
        optimizer.step(lambda batch=batch: losses(model, batch))
        resumed.step(lambda batch=batch: losses(other, batch))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    found, expected = resumed.last_step, optimizer.last_step
    assert_equal({"weights": found.weights}, {"weights": expected.weights})
    assert_equal({"losses": found.losses}, {"losses": expected.losses})
    assert its_scaler.get_scale() == scaler.get_scale()


class Noisy(nn.Module):
    """Keeps the dropout masks that it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(torch.float32)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.empty(x.shape, device=x.device).bernoulli_(0.5)
        self.masks.append(mask)
        return self.body(x * mask)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("replay", [True, False])
def test_dropout_at_displaced_weights(replay: bool, engine: str) -> None:
    model = Noisy().to(DEVICE)
    (batch,) = batches(1, dtype=torch.float32)
    optimizer = gk.wrap(
        sgd([*model.parameters()]), gk.SAM(rho=0.1), model=model, engine=engine, replay_rng=replay
    )
    torch.manual_seed(3)
    optimizer.step(lambda: losses(model, batch)["source"])
    first, second = model.masks
    assert torch.equal(first, second) == replay
    after = torch.rand(5, device=DEVICE)
    torch.manual_seed(3)
    for _ in range(1 if replay else 2):
        torch.empty(batch[0].shape, device=DEVICE).bernoulli_(0.5)
    assert torch.equal(torch.rand(5, device=DEVICE), after)


@pytest.mark.parametrize("engine", ENGINES)
def test_random_numbers_are_put_back_when_a_step_raises(engine: str) -> None:
    model = Noisy().to(DEVICE)
    (batch,) = batches(1, dtype=torch.float32)
    optimizer = gk.wrap(
        sgd([*model.parameters()]), gk.PCGrad(), gk.SAM(), model=model, engine=engine
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def failing() -> dict[str, Tensor]:
        found = losses(model, batch)
        if len(model.masks) == 2:
            raise ZeroDivisionError
        return found

    torch.manual_seed(3)
    expected = torch.rand(5, device=DEVICE), torch.rand(5)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    assert torch.equal(torch.rand(5, device=DEVICE), expected[0])
    assert torch.equal(torch.rand(5), expected[1])
    assert_equal(dict(model.state_dict()), before)
