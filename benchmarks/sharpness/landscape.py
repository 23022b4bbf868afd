"""Two minima of the same depth in the plane, one sharp and one flat.

    L(θ) = −log(exp(−10·‖θ − s‖²) + exp(−¼·‖θ − f‖²)),    s = (−2, 0),  f = (2, 0)

so that L is close to the lower of two bowls, whose curvatures are 20 and ½; the narrow one has a
radius of 0.6. Every step adds a linear function n·θ to the loss, with noise n ~ N(0, 1), as batches
of examples would; both gradients of a step have the same n. All methods have the same noise.

The landscape is made up for the picture and no ranking. Without noise, SAM stops where its ascent
ends at s: the gradient is 0 there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradkit as gk
from benchmarks.alignment.jobs import run_jobs
from benchmarks.alignment.strategies import one_line
from benchmarks.sharpness.methods import FAILURES, METHODS, build

SHARP, FLAT = (-2.0, 0.0), (2.0, 0.0)
CURVATURES = (20.0, 0.5)
STARTS = ((-2.4, 0.2), (-1.8, -0.3), (-2.1, 0.5), (-2.9, 0.9))
LR, MOMENTUM, STEPS = 0.01, 0.9, 200
NEAR = 2.0
"""A path has arrived if it ends so near to f. Some stay between the wells, as SAM without noise."""


def bowls(theta: Tensor) -> Tensor:
    """The sharp and the flat bowl at points [..., 2], as [2, ...]."""
    pairs = zip(CURVATURES, (SHARP, FLAT), strict=True)
    return torch.stack([h / 2 * (theta - theta.new_tensor(c)).square().sum(-1) for h, c in pairs])


def loss(theta: Tensor) -> Tensor:
    """L at points [..., 2]."""
    return -torch.logsumexp(-bowls(theta), dim=0)


@dataclass(frozen=True)
class _Job:
    method: str
    start: int
    steps: int


def _run(job: _Job) -> tuple[Tensor, str | None]:
    """The path [steps + 1, 2], shorter where it failed, and by what."""
    point = torch.nn.Parameter(torch.tensor(STARTS[job.start]))
    method = METHODS.get(job.method)
    plain = method is not None and method.plain
    # BSAM has a momentum of its own, and its examples are so many that it draws hardly any noise.
    base = torch.optim.SGD([point], lr=10 * LR if plain else LR, momentum=0 if plain else MOMENTUM)
    chain = build(
        job.method,
        steps=job.steps,
        examples=100_000,
        seed=job.start,
        **({} if method is None else method.landscape),
    )
    optimizer = gk.wrap(base, *chain)
    noise = torch.randn(job.steps, 2, generator=torch.Generator().manual_seed(job.start))
    path, error = [point.detach().clone()], None
    try:
        for n in noise:
            optimizer.step(lambda n=n: loss(point) + n @ point)  # type: ignore[misc] # called at once
            path.append(point.detach().clone())
    except FAILURES as failure:
        error = one_line(failure)
    return torch.stack(path), error


def run_landscape(
    names: Sequence[str], steps: int, workers: int
) -> tuple[list[dict[str, Any]], dict[str, list[Tensor]]]:
    """Descends from every start by every method.

    Returns:
        A row for each method, with the number of ends near the flat minimum, and its paths.
    """
    jobs = [_Job(name, start, steps) for name in names for start in range(len(STARTS))]
    found = run_jobs(_run, jobs, workers, "landscape")
    rows: list[dict[str, Any]] = []
    paths: dict[str, list[Tensor]] = {}
    for name in names:
        own = [result for job, result in zip(jobs, found, strict=True) if job.method == name]
        paths[name] = [path for path, _ in own]
        ends = torch.stack([path[-1] for path in paths[name]])
        away = (ends - torch.tensor(FLAT)).norm(dim=-1)
        rows.append(
            {
                "method": name,
                "flat": int((away <= NEAR).sum()),
                "starts": len(own),
                "distance": away.mean().item(),
                "finals": ends.tolist(),
                "error": next((error for _, error in own if error), None),
            }
        )
    return rows, paths
