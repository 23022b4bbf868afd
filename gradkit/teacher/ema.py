"""EMA: the plain mean teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from gradkit.oracle import Context
from gradkit.teacher.decay import check_decay, like, warmed_up
from gradkit.teacher.mean_teacher import MeanTeacher


@dataclass(eq=False)
class EMA(MeanTeacher):
    """A mean teacher ([Tarvainen & Valpola, NeurIPS 2017](https://arxiv.org/abs/1703.01780)).

    After each applied step, with θ the student's new weights:

        α_t = min(1 − 1/(t+1), decay) with warm-up, else decay        t = 1, 2, …
        teacher ← α_t·teacher + (1 − α_t)·θ

    The teacher's buffers are copied from the student. Save the teacher as a module, beside the
    optimizer: `{"teacher": ema.teacher.state_dict(), "optimizer": optimizer.state_dict()}`.

    Cost: one pass over the weights. Memory: the teacher. State: t.

    Args:
        student: The module that is trained.
        teacher: The module that follows it; None makes a frozen copy of the student.
        decay: α, between 0 (a copy) and 1 (no change).
        warmup: Whether to start as a plain mean of the weights seen.

    Examples:
        >>> import torch, gradkit as gk
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(student.weight)
        >>> ema = gk.EMA(student, decay=0.9)
        >>> optimizer = gk.wrap(torch.optim.SGD(student.parameters(), lr=1.0), ema, model=student)
        >>> _ = optimizer.step(lambda: -student.weight.sum())
        >>> student.weight.item(), round(ema.teacher.weight.item(), 6)
        (1.0, 0.1)
    """

    student: nn.Module = field(repr=False)
    teacher: nn.Module = field(default=None, repr=False)  # type: ignore[assignment]  # made below
    decay: float = field(kw_only=True)
    warmup: bool = False
    in_state: bool = False
    needs_rows = False

    def __post_init__(self) -> None:
        check_decay("decay", self.decay)
        self._begin()

    def after_step(self, context: Context) -> None:  # noqa: D102 # see the class
        decay = warmed_up(self.decay, self._t) if self.warmup else self.decay
        self._move(1 - decay)
        context.decay = like(decay, context)
