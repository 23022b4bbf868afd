"""GS-EMA's step beside the same training with a plain mean teacher, and its cosine of signs."""

import functools

import torch

import gradkit as gk
from benchmarks.speed.comparison import Comparison, Step, Traffic
from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.problem import Problem
from gradkit.core.gram import cosines, gram
from gradkit.engines import EngineName

METHOD = "GS-EMA"
SIGNS = "cosine of signs"
WITHOUT_ZEROS = "gradkit, without zeros"
MEAN_TEACHER = "plain mean teacher by hand"
_OBJECTIVES = ("source", "target")


def mean_teacher(problem: Problem) -> Step:
    """One forward pass, two backward passes, the base's step on their sum, and the average."""
    model, base = problem.pair()
    parameters = list(model.parameters())
    teacher = [parameter.detach().clone() for parameter in parameters]

    def step() -> None:
        source, target = problem.losses(model, 2)
        grads = list(torch.autograd.grad(source, parameters, retain_graph=True))
        torch._foreach_add_(grads, torch.autograd.grad(target, parameters))
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        base.step()
        base.zero_grad()
        torch._foreach_lerp_(teacher, [parameter.detach() for parameter in parameters], 0.1)

    return step


def gated(problem: Problem, engine: EngineName) -> Step:
    """GS-EMA's step on two losses of one forward pass."""
    model, base = problem.pair()
    optimizer = gk.GSEMA(base, model, engine=engine)

    def step() -> None:
        optimizer.step(lambda: dict(zip(_OBJECTIVES, problem.losses(model, 2), strict=True)))
        optimizer.zero_grad()

    return step


def gs_ema(problem: Problem) -> Comparison:
    """GS-EMA against two backward passes and a plain mean teacher."""
    return Comparison(
        method=METHOD,
        passes="1 forward, 2 backward, their sum (2R 1W), base step (2R 1W), average (2R 1W)",
        floor=functools.partial(mean_teacher, problem),
        ours={
            gradkit_name(engine): functools.partial(gated, problem, engine) for engine in ENGINES
        },
        peers={MEAN_TEACHER: functools.partial(mean_teacher, problem)},
        traffic=Traffic((("copy to rows", 2, 2), ("cosine of signs", 2, 0)), problem.parameters()),
    )


def sign_cosine(problem: Problem) -> Comparison:
    """The cosine of two gradients' signs against a copy of one of them.

    Gradients with zeros, as dead units leave them, are counted element by element.
    """

    def rows(with_zeros: bool) -> torch.Tensor:
        generator = torch.Generator(problem.x.device).manual_seed(0)
        size = (2, problem.parameters())
        made = torch.randn(size, generator=generator, device=problem.x.device)
        made[made == 0] = 1.0
        if with_zeros:
            made[0, ::1000] = 0.0
        return made

    def floor() -> Step:
        source, target = rows(with_zeros=False)
        return lambda: target.copy_(source)

    def ours(with_zeros: bool) -> Step:
        gradients = rows(with_zeros)
        return lambda: cosines(gram(gradients, signs=True))

    return Comparison(
        method=SIGNS,
        passes="1 copy (1R 1W)",
        floor=floor,
        ours={
            WITHOUT_ZEROS: functools.partial(ours, with_zeros=False),
            "gradkit, with zeros": functools.partial(ours, with_zeros=True),
        },
        peers={},
        traffic=Traffic(((SIGNS, 2, 0),), problem.parameters()),
    )
