"""A mean teacher whose decay depends on the angle between two gradients."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle, Selection
from gradkit.teachers.decay import check_decay, like, warmed_up
from gradkit.teachers.mean_teacher import MeanTeacher

Measure = Literal["sign_cosine", "cosine"]


@dataclass(eq=False)
class GatedEMA(MeanTeacher):
    """A mean teacher whose decay depends on whether two gradients agree (GS-EMA).

    From GS-EMA: gradient surgery exponential moving average with boundary-aware contrastive
    learning for cerebral aneurysm segmentation ([arXiv:2402.15239](https://arxiv.org/abs/2402.15239)):

        c   = cos(sign ∇L_source, sign ∇L_target)      before the student's step, at θ_t
        α   = decay_aligned if c > threshold else decay_conflict
        α_t = min(1 − 1/(t+1), α)                      warm-up, t = 1, 2, …
        teacher ← α_t·teacher + (1 − α_t)·θ_{t+1}      the student after its step

    A zero gradient has cosine 0 and counts as conflict. The measure, both decays and the warm-up
    are those of the authors' code. Their text updates only when gradients are aligned, by the angle
    of the raw gradients (`measure="cosine", decay_conflict=None`). The test in their Algorithm 1 is
    reversed (`invert=True`), which contradicts text and code and is assumed to be a mistake.

    The gradients themselves are not changed. `EMA` describes how weights and buffers follow, and
    how the teacher is saved. A step that does not move the teacher does not change its buffers.

    Cost: none beyond both gradients and one pass over the weights. Memory and state: those of
    `EMA`.

    Args:
        student: The module that is trained.
        teacher: The module that follows it; None makes a frozen copy of the student.
        between: The two objectives whose gradients are compared.
        measure: "sign_cosine", the cosine of the elementwise signs, or "cosine".
        decay_aligned: α when aligned.
        decay_conflict: α in conflict; None does not move the teacher.
        threshold: The cosine above which gradients count as aligned.
        invert: Whether to exchange the two cases.
        warmup: Whether to start as a plain mean of the student's weights.
        in_state: Whether the optimizer's state dict includes the teacher.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, if the student cannot be copied, or if the
            teacher does not fit; in `step`, if it no longer fits.

    Examples:
        >>> import torch, gradkit as gk
        >>> student = torch.nn.Linear(2, 1, bias=False)
        >>> gated = gk.GatedEMA(student, warmup=False)
        >>> optimizer = gk.wrap(torch.optim.SGD(student.parameters(), lr=0.1), gated, model=student)
        >>> source, target = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
        >>> _ = optimizer.step(
        ...     {"source": lambda: student(source).sum(), "target": lambda: student(target).sum()}
        ... )
        >>> optimizer.last_step.gate, optimizer.last_step.decay
        (tensor(1.), tensor(0.9000))
    """

    student: nn.Module = field(repr=False)
    teacher: nn.Module = field(default=None, repr=False)  # type: ignore[assignment]  # made below
    between: tuple[str, str] = ("source", "target")
    measure: Measure = "sign_cosine"
    decay_aligned: float = 0.9
    decay_conflict: float | None = 0.999
    threshold: float = 0.0
    invert: bool = False
    warmup: bool = True
    in_state: bool = False

    def __post_init__(self) -> None:
        check_decay("decay_aligned", self.decay_aligned)
        if self.decay_conflict is not None:
            check_decay("decay_conflict", self.decay_conflict)
        if self.measure not in ("sign_cosine", "cosine"):
            raise ValueError(f"measure is {self.measure!r}; choose 'sign_cosine' or 'cosine'")
        check_number("threshold", self.threshold, finite=False)
        if len(self.between) != 2 or self.between[0] == self.between[1]:
            raise ValueError(f"between is {self.between!r}; name two different objectives")
        self._begin()

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            context.require(self, *self.between)
            if context.gate is not None:
                return inner(at, only)
            gradients = inner(at, Selection(only, include=tuple(self.between)))
            context.require(self, *self.between)
            cosine = gradients.cosine(*self.between, signs=self.measure == "sign_cosine")
            aligned = (cosine > self.threshold) != self.invert
            context.gate = aligned.to(cosine.dtype)
            return gradients

        return oracle

    def after_step(self, context: Context) -> None:
        assert context.gate is not None  # set by the first evaluation
        aligned, conflict = self.decay_aligned, self.decay_conflict
        if self.warmup:
            aligned = warmed_up(aligned, self._t)
            conflict = None if conflict is None else warmed_up(conflict, self._t)
        conflict = 1.0 if conflict is None else conflict
        # 1 − α is computed in double precision, before it becomes a tensor.
        is_aligned = context.gate > 0
        share = torch.where(is_aligned, like(1 - aligned, context), like(1 - conflict, context))
        self._move(share)
        context.decay = torch.where(is_aligned, like(aligned, context), like(conflict, context))
