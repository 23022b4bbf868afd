"""An ascent that the task, the divergence between domains or both show the way."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal, get_args

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle, Selection
from gradkit.divergence.weight import DIVERGENCE, TASK
from gradkit.sharpness.ascent import Ascent

PerturbOn = Literal["total", "task", "divergence"]
ApplyAt = Literal["perturbed", "clean"]

_ASCENTS = {
    "total": Selection(None),
    "task": Selection(None, exclude=(DIVERGENCE,)),
    "divergence": Selection((DIVERGENCE,)),
}


@dataclass(eq=False, repr=False)
class DivergenceAscent(Ascent):
    """SAM's step, along the task's gradient, the divergence's or both; a part of `gk.DiM`.

        d = ∇L_task + λ·∇D, ∇L_task or λ·∇D at θ          perturb_on total, task, divergence
        ε = ρ·d / (‖d‖ + 1e-12)
        step on ∇L_task(θ + ε) + λ·∇D(θ + ε)               apply_at perturbed
                ∇L_task(θ + ε) + λ·∇D(θ)                   apply_at clean

    λ is the weight that `DivergenceWeight`, before it in `wrap`, has given to the objective
    "divergence". Objectives besides "task" and "divergence" count as the task. DiM's equations are
    not public: this is a reconstruction; see `gk.DiM`.

    With one closure for all objectives each evaluation runs it once, and buffers, such as
    BatchNorm's statistics, and reported losses are those at θ. With a closure for each, an
    objective that takes no part in the ascent is evaluated at θ + ε only, and its buffers and
    loss are those there.

    Cost: with "total" two gradients of each objective, with "task" two of the task and one of the
    divergence, with "divergence" two of it and one of the task; with "clean" at most one of the
    divergence. Memory: as SAM; with "clean" one flat vector for each objective and point. State:
    none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        perturb_on: What the ascent follows: "total", "task" or "divergence".
        apply_at: Where the divergence's gradient is taken for the step: "perturbed" or "clean".
        only: Which parameters are displaced; see `gradkit.sharpness.Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `gradkit.sharpness.Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value; in `step`, if the step lacks the objective
            "task" or "divergence".

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> ascent = gk.divergence.DivergenceAscent(rho=0.5, perturb_on="divergence")
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), ascent)
        >>> _ = optimizer.step(
        ...     {"task": lambda: w[0] ** 2 / 2, "divergence": lambda: w[1] ** 2 / 2}
        ... )
        >>> w.grad  # at (1, 1.5)
        tensor([1.0000, 1.5000])
    """

    perturb_on: PerturbOn = "total"
    apply_at: ApplyAt = "perturbed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self.perturb_on, self.apply_at)
        self.needs_rows = self.apply_at == "clean"

    def around(self, inner: Oracle, context: Context) -> Oracle:
        along = _ASCENTS[self.perturb_on]

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            context.require(self, TASK, DIVERGENCE)
            wanted = self.apply_at == "clean" and (only is None or DIVERGENCE in only)
            beside = wanted and self.perturb_on == "task"
            first = inner(at, None if beside else along)
            context.require(self, TASK, DIVERGENCE)  # known now, if one closure has them all
            guide = first.observe(DIVERGENCE) if beside else first
            point: Point = self.above(guide, at, context)
            clean = first if wanted else None
            del first, guide  # and their rows, before the second evaluation
            for _ in range(self.steps - 1):
                point = self.above(inner(point, along), point, context)
            if self.apply_at == "perturbed":
                return inner(point, only)
            there = inner(point, Selection(only, exclude=(DIVERGENCE,)))
            if clean is None:
                return there
            sources = {**dict.fromkeys(there.names, there), DIVERGENCE: clean}
            return context.join(sources, there)

        return oracle


def check_choices(perturb_on: object, apply_at: object) -> None:
    """Check what an ascent follows, and where the divergence's gradient is taken.

    Raises:
        ValueError: If there is no such choice.
    """
    for name, value, choices in (
        ("perturb_on", perturb_on, get_args(PerturbOn)),
        ("apply_at", apply_at, get_args(ApplyAt)),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
