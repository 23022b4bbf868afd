"""What ranks do that share one device."""

from __future__ import annotations

import torch
from processes import training
from torch import Tensor, nn

CASES = ["PCGrad", "PCGrad+SAM", "LookAhead+CosineLR", "GatedEMA", "generators"]


def train_on(device: str, kind: str, cases: list[str]) -> dict[str, dict[str, Tensor]]:
    """The trainings of `processes.training` on a device; what they come to, on the CPU."""
    network, batches = training.network, training.batches

    def placed(seed: int = 0) -> nn.Module:
        return network(seed).to(device)

    training.network = placed
    training.batches = lambda: [batch.to(device) for batch in batches()]
    try:
        results = training.train_all(kind, cases)
    finally:
        training.network, training.batches = network, batches
    return {
        case: {what: value.cpu() for what, value in found.items()}
        for case, found in results.items()
    }


def fail_on_one(device: str) -> str:
    """What a rank raises when another one's closure fails, on a device."""
    import torch.distributed as dist

    import gradkit as gk

    model = training.network().to(device)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1),
        gk.PCGrad(),
        model=model,
        process_group=dist.group.WORLD,
        engine="inplace",
    )
    x = training.batches()[0].to(device)

    def closure() -> dict[str, Tensor]:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a fault of rank 1")
        return training.losses(model, x)

    try:
        optimizer.step(closure)
    except (gk.RankError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
