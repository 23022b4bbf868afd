"""Training that stops on some ranks and goes on, from a distributed checkpoint, on others."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import gradkit as gk
from processes.training import (
    batches,
    gathered,
    losses,
    network,
    options_for,
    prepared,
    share,
)

SAVED_AT = 3


class Trail(gk.Transform):
    """A transform with a flat vector and a number of its own: the mean of past directions."""

    def __init__(self) -> None:
        self.state["steps"] = 0

    def initial_vectors(self, layout: Any) -> dict[str, Tensor]:
        return {"trail": torch.zeros(layout.numel, dtype=layout.dtype, device=layout.device)}

    def around(self, inner: gk.Oracle, context: gk.Context) -> gk.Oracle:
        def oracle(at: Tensor | None = None, only: Container[str] | None = None) -> gk.Gradients:
            gradients = inner(at, only)
            trail = self.vectors["trail"] * 0.5 + gradients.direction()
            context.propose(self, trail=trail, steps=self.state["steps"] + 1)
            return gradients.replace(update=trail / (1 + self.state["steps"]))

        return oracle


def made(kind: str, seed: int = 1) -> tuple[nn.Module, gk.GradientOptimizer]:
    model = prepared(kind, network())
    teacher = prepared("plain" if kind == "ddp" else kind, network(seed)).requires_grad_(False)
    ema = gk.EMA(model, teacher, decay=0.8, in_state=True)
    base = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, gk.wrap(base, gk.PCGrad(), gk.SAM(), Trail(), ema, **options_for(kind, model))


def advance(
    model: nn.Module, optimizer: gk.GradientOptimizer, start: int, stop: int
) -> dict[str, Tensor]:
    for batch in batches()[start:stop]:
        x = share(batch)
        optimizer.step(lambda: losses(model, x))
    trails = [optimizer.state[p]["gradkit.2.trail"] for p in model.parameters()]
    teacher = optimizer.transforms[3].teacher
    return {
        "weights": gathered(model.parameters()),
        "teacher": gathered([*teacher.parameters(), *teacher.buffers()]),
        "trail": gathered(trails),
        "steps": torch.tensor(optimizer.transforms[2].state["steps"]),
    }


def uninterrupted(stop: int) -> dict[str, Tensor]:
    return advance(*made("plain"), 0, stop)


def save(kind: str, folder: str) -> dict[str, Tensor]:
    model, optimizer = made(kind)
    reached = advance(model, optimizer, 0, SAVED_AT)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder))
    return reached


def load(kind: str, folder: str, stop: int) -> dict[str, Tensor]:
    model, optimizer = made(kind, seed=2)  # its teacher must give way to the saved one
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=Path(folder))
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    return advance(model, optimizer, SAVED_AT, stop)
