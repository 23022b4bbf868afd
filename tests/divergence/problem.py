"""A task on one domain and a gap to another, in float64, with both written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from helpers import forward, seeded
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]
"""Source inputs and targets, target inputs."""


def domains(count: int, seed: int = 1) -> Iterator[Batch]:
    generator = seeded(seed)
    for _ in range(count):
        x, shifted = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        yield x, y, 1.5 * shifted + 0.5


def task(batch: Batch, *weights: Tensor) -> Tensor:
    x, y, _ = batch
    return (forward(x, *weights) - y).square().mean()


def shares(x: Tensor, *weights: Tensor) -> Tensor:
    return torch.softmax(forward(x, *weights), 1).mean(0)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (p * (p / m).log() + q * (q / m).log()).sum()


def gap(batch: Batch, *weights: Tensor) -> Tensor:
    return jensen_shannon(shares(batch[0], *weights), shares(batch[2], *weights))


def by_hand(
    batch: Batch,
    weights: Sequence[Tensor],
    rho: float,
    weight: float,
    perturb_on: str | None,
    apply_at: str,
    gap: Callable[..., Tensor] = gap,
) -> list[Tensor]:
    """The direction of a step, from the equations in the docstrings."""

    def gradients(loss: Callable[..., Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        points = [w.detach().clone().requires_grad_() for w in at]
        return [*torch.autograd.grad(loss(batch, *points), points)]

    here = gradients(task, weights), [weight * g for g in gradients(gap, weights)]
    there = list(weights)
    if perturb_on is not None:
        total = [a + b for a, b in zip(*here, strict=True)]
        d = {"total": total, "task": here[0], "divergence": here[1]}[perturb_on]
        norm = torch.cat([part.reshape(-1) for part in d]).norm() + 1e-12
        there = [w.detach() + rho * part / norm for w, part in zip(weights, d, strict=True)]
    of_gap = here[1]
    if apply_at == "perturbed":
        of_gap = [weight * g for g in gradients(gap, there)]
    return [a + b for a, b in zip(gradients(task, there), of_gap, strict=True)]
