"""Other libraries' steps. A peer that is not installed is left out."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from benchmarks.speed.comparison import MakeStep, Step
from benchmarks.speed.problem import Problem

MOST_BY_PAIRS = 8
"""Objectives up to which pytorch-optimizer takes part: it moves K² vectors, half a minute at 16."""


def _named(title: str, package: str) -> str:
    try:
        return f"{title} {version(package)}"
    except PackageNotFoundError:
        return f"{title} (not installed)"


TORCHJD = _named("TorchJD", "torchjd")
PYTORCH_OPTIMIZER = _named("pytorch-optimizer", "pytorch_optimizer")


def pcgrad_peers(problem: Problem, count: int) -> dict[str, MakeStep]:
    """PCGrad on K losses of one forward pass."""

    def torchjd() -> Step:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        model, base = problem.pair()
        parameters, aggregator = list(model.parameters()), PCGrad()

        def step() -> None:
            backward(problem.losses(model, count))
            jac_to_grad(parameters, aggregator)
            base.step()
            base.zero_grad()

        return step

    def pytorch_optimizer() -> Step:
        from pytorch_optimizer import PCGrad

        model, base = problem.pair()
        peer = PCGrad(base, reduction="sum")

        def step() -> None:
            peer.pc_backward(problem.losses(model, count))  # type: ignore[arg-type]  # is losses
            peer.step()
            peer.zero_grad()

        return step

    peers: dict[str, MakeStep] = {}
    if find_spec("torchjd"):
        peers[TORCHJD] = torchjd
    if find_spec("pytorch_optimizer") and count <= MOST_BY_PAIRS:
        peers[PYTORCH_OPTIMIZER] = pytorch_optimizer
    return peers


def sam_peers(problem: Problem) -> dict[str, MakeStep]:
    """SAM on one loss."""

    def pytorch_optimizer() -> Step:
        from pytorch_optimizer import SAM

        model = problem.model()
        optimizer = SAM(list(model.parameters()), base_optimizer=torch.optim.SGD, lr=1e-6)

        def step() -> None:
            problem.loss(model).backward()
            optimizer.first_step(zero_grad=True)
            problem.loss(model).backward()
            optimizer.second_step(zero_grad=True)

        return step

    return {PYTORCH_OPTIMIZER: pytorch_optimizer} if find_spec("pytorch_optimizer") else {}
