"""Gradients from before the step, which closures clear or add to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkit as gk

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_from_before_that_a_closure_clears_do_not_count(
    engine: str, to_none: bool
) -> None:
    results = []
    for before in (True, False):
        model = network()
        optimizer = gk.wrap(sgd(model), model=model, engine=engine)
        if before:
            model(INPUT).sum().backward()

        def closure() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=to_none)
            return model(INPUT).square().mean()

        buffers = [buffer.clone() for buffer in network().buffers()]
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        optimizer.step(closure)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*results)
