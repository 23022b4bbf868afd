"""PCGrad, loss weighting, SAM and GatedEMA's update: floors, gradkit's engines, and peers."""

import functools
from collections.abc import Callable

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradkit as gk
from benchmarks.speed.comparison import Comparison, Step, Traffic
from benchmarks.speed.passes import (
    BATCHED,
    GRAPHED,
    backward_passes,
    batched_passes,
    graphed_passes,
    summed_losses,
)
from benchmarks.speed.peers import pcgrad_peers, sam_peers
from benchmarks.speed.problem import Problem
from gradkit.engines import EngineName
from gradkit.optimizer.options import RowsChoice
from gradkit.teachers import follow

ENGINES: tuple[EngineName, ...] = ("functional", "inplace")


def gradkit_name(engine: str) -> str:
    """How gradkit's variants are called."""
    return f"gradkit, {engine}"


def surgery(
    problem: Problem,
    count: int,
    method: Callable[[], gk.Transform],
    engine: EngineName,
    rows: RowsChoice = "auto",
) -> Step:
    """Gradkit's step with one transform, on K losses of one forward pass."""
    model, base = problem.pair()
    optimizer = gk.wrap(base, method(), model=model, engine=engine, rows=rows)

    def closure() -> dict[str, torch.Tensor]:
        return {str(k): loss for k, loss in enumerate(problem.losses(model, count))}

    def step() -> None:
        optimizer.step(closure)
        optimizer.zero_grad()

    return step


def pcgrad(problem: Problem, count: int) -> Comparison:
    """One forward pass, K backward passes and the base's step, against surgery on K objectives."""
    peers = {
        **pcgrad_peers(problem, count),
        BATCHED: functools.partial(batched_passes, problem, count),
    }
    if problem.x.device.type == "cuda":
        peers[GRAPHED] = functools.partial(graphed_passes, problem, count)
    return Comparison(
        method=f"PCGrad, K = {count}",
        passes=f"1 forward, {count} backward, base step (2R 1W)",
        floor=functools.partial(backward_passes, problem, count),
        ours={
            gradkit_name(engine): functools.partial(surgery, problem, count, gk.PCGrad, engine)
            for engine in ENGINES
        },
        peers=peers,
        traffic=Traffic(
            (("rows", count, count), ("Gram", count, 0), ("combination", count, 1)),
            problem.parameters(),
        ),
    )


def weighting(problem: Problem, count: int, name: str) -> Comparison:
    """Plain training on the sum of K losses, against their sum with weights chosen by `name`."""
    method: Callable[[], gk.Transform] = getattr(gk, name)
    return Comparison(
        method=f"{name}, K = {count}",
        passes="1 forward, 1 backward, base step (2R 1W)",
        floor=functools.partial(summed_losses, problem, count),
        ours={
            gradkit_name(engine): functools.partial(surgery, problem, count, method, engine)
            for engine in ENGINES
        },
        peers={},
        traffic=Traffic((), problem.parameters()),
    )


def sam(problem: Problem) -> Comparison:
    """Two plain training passes and the base's step, against SAM."""

    def floor() -> Step:
        model, base = problem.pair()

        def step() -> None:
            for _ in range(2):
                base.zero_grad()
                problem.loss(model).backward()
            base.step()
            base.zero_grad()

        return step

    def ours(engine: EngineName) -> Step:
        model, base = problem.pair()
        optimizer = gk.wrap(base, gk.SAM(), model=model, engine=engine)

        def step() -> None:
            optimizer.step(lambda: problem.loss(model))
            optimizer.zero_grad()

        return step

    return Comparison(
        method="SAM",
        passes="2 forward, 2 backward, base step (2R 1W)",
        floor=floor,
        ours={gradkit_name(engine): functools.partial(ours, engine) for engine in ENGINES},
        peers=sam_peers(problem),
        traffic=Traffic((("norm", 1, 0), ("displaced weights", 2, 1)), problem.parameters()),
    )


def gated_ema(problem: Problem) -> Comparison:
    """One pass of interpolation over the weights, against what GatedEMA adds to a step.

    The step has two objectives. Its floor does not depend on the batch, so one case is enough.
    """

    def floor() -> Step:
        teacher = [parameter.detach() for parameter in problem.model().parameters()]
        student = [parameter.detach() for parameter in problem.model().parameters()]
        return lambda: torch._foreach_lerp_(teacher, student, 0.1)

    def follows() -> Step:
        teacher, student = problem.model(), problem.model()
        decay = torch.tensor(0.9, device=problem.x.device)
        return lambda: follow(teacher, student, decay)

    def training(engine: EngineName, gated: bool) -> Step:
        model, base = problem.pair()
        chain = (gk.GatedEMA(model),) if gated else ()
        optimizer = gk.wrap(base, *chain, model=model, engine=engine)

        def step() -> None:
            optimizer.step(
                lambda: dict(zip(("source", "target"), problem.losses(model, 2), strict=True))
            )
            optimizer.zero_grad()

        return step

    def averaged() -> Step:
        model = problem.model()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
        return lambda: average.update_parameters(model)

    return Comparison(
        method="GatedEMA's update",
        passes="1 torch._foreach_lerp_ (2R 1W)",
        floor=floor,
        ours={
            **{
                gradkit_name(engine): functools.partial(training, engine, gated=True)
                for engine in ENGINES
            },
            "gradkit's follow() by itself": follows,
        },
        without={
            gradkit_name(engine): functools.partial(training, engine, gated=False)
            for engine in ENGINES
        },
        peers={f"torch {torch.__version__.partition('+')[0]}, AveragedModel": averaged},
        traffic=Traffic((("cosine of signs", 2, 0),), problem.parameters()),
    )
