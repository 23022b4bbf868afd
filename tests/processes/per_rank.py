"""Short trainings in which each rank perturbs its weights by gradients of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradkit as gk
from processes.training import batches, gathered, losses, network, options_for, prepared, share

STEPS = 4
LR = 0.1
CHAINS: dict[str, Callable[[], tuple[gk.Transform, ...]]] = {
    "SAM": lambda: (gk.SAM(rho=0.1, sync_perturbation=False),),
    "SAM, two steps": lambda: (gk.SAM(rho=0.1, steps=2, sync_perturbation=False),),
    "GSAM": lambda: (gk.GSAM(rho=0.1, sync_perturbation=False),),
    "FriendlySAM": lambda: (gk.FriendlySAM(rho=0.1, sync_perturbation=False),),
    "MGDA inside": lambda: (gk.MGDA(), gk.SAM(rho=0.1, sync_perturbation=False)),
    "MGDA outside": lambda: (gk.SAM(rho=0.1, sync_perturbation=False), gk.MGDA()),
    "in another": lambda: (gk.SAM(rho=0.1, sync_perturbation=False), gk.SAM(rho=0.05)),
    "losses weighted": lambda: (gk.weighting.GLS(), gk.SAM(rho=0.1, sync_perturbation=False)),
    "every second": lambda: (gk.Every(2, gk.SAM(rho=0.1, sync_perturbation=False)),),
}


def train(kind: str, chain: str) -> dict[str, Any]:
    """Weights, records and saved state after some steps, or the error."""
    try:
        model = prepared(kind, network())
        base = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer = gk.wrap(base, *CHAINS[chain](), **options_for(kind, model))
        reported = []
        for batch in batches()[:STEPS]:
            x = share(batch)
            loss = optimizer.step(lambda x=x: losses(model, x))
            reported += [loss[None], optimizer.last_step.gram.flatten()]
        return {
            "weights": gathered(model.parameters()),
            "reported": torch.cat(reported),
            "state": gk.testing.bits(optimizer.state_dict()["state"]),
        }
    except Exception as error:
        return {"error": str(error), "traceback": traceback.format_exc()}


class Observing(gk.Transform):
    """Takes the third objective out of the direction."""

    def around(self, inner: gk.Oracle, context: gk.Context) -> gk.Oracle:
        return lambda at=None, only=None: inner(at, only).observe("third")


def overflow(kind: str) -> list[Any]:
    """Whether a step is applied where one rank alone meets a NaN, and the weights afterwards."""
    model = prepared(kind, network())
    base = torch.optim.SGD(model.parameters(), lr=LR)
    transforms = (Observing(), gk.SAM(rho=0.1, sync_perturbation=False))
    optimizer = gk.wrap(base, *transforms, nonfinite="skip", **options_for(kind, model))
    x = share(batches()[0])
    found: list[Any] = []
    for factor in (torch.nan if torch.distributed.get_rank() == 1 else 1.0, 1.0):
        # The loss is finite, and the direction, too: the objective is an observer.
        optimizer.step(lambda factor=factor: _with_gradient_times(losses(model, x), factor))
        found += [optimizer.last_step.applied, gathered(model.parameters())]
    return found


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _with_gradient_times(found: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {**found, "third": _Times.apply(found["third"], factor)}


def run(kind: str) -> dict[str, Any]:
    """All trainings of a kind, in one start of the ranks."""
    results: dict[str, Any] = {chain: train(kind, chain) for chain in CHAINS}
    if kind != "fsdp":
        results["overflow"] = overflow(kind)
    return results


# What two ranks do, by hand and in one process.


def rows(w: Tensor, x: Tensor) -> Tensor:
    """The three objectives' gradients on one rank's inputs."""
    model = network()
    nn.utils.vector_to_parameters(w, model.parameters())
    parameters = [*model.parameters()]
    found = []
    for loss in losses(model, x).values():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]
        found.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(found)


def unit(v: Tensor) -> Tensor:
    return v / (v.norm() + 1e-12)


def by_hand(chain: str) -> Tensor:
    """The weights after the same steps, where both ranks' halves are in one process."""
    w = nn.utils.parameters_to_vector(network().parameters()).detach()
    mean = None
    for step, batch in enumerate(batches()[:STEPS]):
        halves = batch.chunk(2)
        if chain == "in another":
            ahead = sum(sam(w, x, 0.1) for x in halves) / 2
            w = w - LR * sum(sam(w + 0.05 * unit(ahead), x, 0.1) for x in halves) / 2
            continue
        if chain == "losses weighted":  # weights are those of both ranks' losses
            first = geometric(w, w, halves)
            points = [w + 0.1 * unit(first @ rows(w, x)) for x in halves]
            second = geometric(*points, halves)
            pairs = zip(points, halves, strict=True)
            w = w - LR * sum(second @ rows(point, x) for point, x in pairs) / 2
            continue
        found = []
        for x in halves:
            if chain == "MGDA inside":
                combine = gk.MGDA()
                found.append(combine(rows(w + 0.1 * unit(combine(rows(w, x))), x)))
            elif chain == "MGDA outside":
                found.append(rows(w + 0.1 * unit(rows(w, x).sum(0)), x))
            elif chain == "GSAM":
                g = rows(w, x).sum(0)
                g_s = rows(w + 0.1 * unit(g), x).sum(0)
                found.append(g_s - 0.4 * (g - (g @ g_s) / (g_s @ g_s) * g_s))
            elif chain == "FriendlySAM":
                g = rows(w, x).sum(0)
                noise = g if mean is None else g - mean
                found.append(rows(w + 0.1 * unit(noise), x).sum(0))
            elif chain == "SAM, two steps":
                point = w + 0.05 * unit(rows(w, x).sum(0))
                found.append(rows(point + 0.05 * unit(rows(point, x).sum(0)), x).sum(0))
            elif chain == "every second" and step % 2:
                found.append(rows(w, x).sum(0))
            else:
                found.append(sam(w, x, 0.1))
        if chain == "FriendlySAM":
            g = sum(rows(w, x).sum(0) for x in halves) / 2
            mean = g if mean is None else 0.9 * mean + 0.1 * g
        both = sum(found) / 2
        w = w - LR * (gk.MGDA()(both) if chain == "MGDA outside" else both)
    return w


def sam(w: Tensor, x: Tensor, rho: float) -> Tensor:
    return rows(w + rho * unit(rows(w, x).sum(0)), x).sum(0)


def geometric(first: Tensor, second: Tensor, halves: tuple[Tensor, ...]) -> Tensor:
    """The weights of the geometric loss strategy, from the mean losses of two ranks."""
    model, every = network(), []
    for w, x in zip((first, second), halves, strict=True):
        nn.utils.vector_to_parameters(w, model.parameters())
        every.append(torch.stack([*losses(model, x).values()]).detach())
    mean = sum(every) / 2
    return mean.prod() ** (1 / len(mean)) / (len(mean) * mean)
