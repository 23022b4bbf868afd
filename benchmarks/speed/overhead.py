"""What the engine adds to the same passes written by hand, where the network costs nothing."""

import functools
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import gradkit as gk
from benchmarks.speed.comparison import Step
from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.timing import Clock, median_interval
from gradkit.engines import EngineName

OVERHEAD = "ms per step over the passes written by hand"
NETWORK = "3-layer MLP"
WARM_UP = 50
# Objectives, and the transforms between them and the optimizer.
KINDS: Mapping[str, tuple[int, tuple[type[gk.PCGrad], ...]]] = {
    "engine, K = 1": (1, ()),
    "engine, K = 4": (4, ()),
    "engine and PCGrad, K = 4": (4, (gk.PCGrad,)),
}


def measure_overhead(pairs: int, device: torch.device, seed: int) -> list[dict[str, object]]:
    """One row for each number of objectives and each engine."""
    rows: list[dict[str, object]] = []
    clock = Clock(device)
    for method, (count, chain) in KINDS.items():
        for engine in ENGINES:
            by_hand, wrapped = steps(count, chain, engine, device)
            differences = [
                milliseconds * 1e3 for milliseconds in paired(by_hand, wrapped, pairs, clock)
            ]
            low, high = median_interval(differences, seed)
            rows.append(
                {
                    "measure": OVERHEAD,
                    "network": NETWORK,
                    "case": "4 rows",
                    "method": method,
                    "variant": gradkit_name(engine),
                    "rounds": pairs,
                    "value": statistics.median(differences),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def paired(by_hand: Step, wrapped: Step, pairs: int, clock: Clock) -> list[float]:
    """Seconds by which one step is longer than the other, one after the other in both orders."""
    differences = []
    for number in range(-WARM_UP, pairs):
        if number % 2:
            first, second = clock.time(by_hand), clock.time(wrapped)
        else:
            second, first = clock.time(wrapped), clock.time(by_hand)
        if number >= 0:
            differences.append(second - first)
    return differences


def steps(
    count: int,
    chain: Sequence[type[gk.PCGrad]],
    engine: EngineName,
    device: torch.device,
) -> tuple[Step, Step]:
    """A step by hand and one by gradkit, each with a network of its own."""
    by_hand_model, wrapped_model = _network(device), _network(device)
    by_hand_base, wrapped_base = (
        torch.optim.SGD(model.parameters(), lr=1e-9) for model in (by_hand_model, wrapped_model)
    )
    optimizer = gk.wrap(
        wrapped_base, *(kind() for kind in chain), model=wrapped_model, engine=engine
    )
    x = torch.rand(4, 8, device=device)
    parameters = list(by_hand_model.parameters())

    def loss(model: nn.Module, k: int) -> Tensor:
        output: Tensor = model(x)
        return output[:, k].mean()

    by_hand_closures = [functools.partial(loss, by_hand_model, k) for k in range(count)]
    closures = {str(k): functools.partial(loss, wrapped_model, k) for k in range(count)}

    def by_hand() -> None:
        for closure in by_hand_closures:
            grads = torch.autograd.grad(closure(), parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        by_hand_base.step()

    return by_hand, lambda: optimizer.step(closures)


def _network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(*layers).to(device)
