"""EMA: the plain mean teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from gradkit.core.context import Context
from gradkit.teachers.decay import check_decay, like, warmed_up
from gradkit.teachers.mean_teacher import MeanTeacher


@dataclass(eq=False)
class EMA(MeanTeacher):
    """A mean teacher ([Tarvainen & Valpola, NeurIPS 2017](https://arxiv.org/abs/1703.01780)).

    After each applied step, with θ the student's new weights:

        α_t = min(1 − 1/(t+1), decay) with warm-up, else decay        t = 1, 2, …
        teacher ← α_t·teacher + (1 − α_t)·θ

    Tensors are matched by name. Integer and boolean weights are copied, not averaged, and so are
    buffers, which take the student's present shape and dtype; a weight that both share because it
    is frozen stays. Parameters, buffers and submodules that the student gets later are copied, and
    buffers that it loses are dropped. What cannot follow (a parameter that has changed its shape,
    or is gone) is refused before the student moves.

    Weights in half precision are averaged in float32 and then rounded, since at a decay of 0.999
    most changes are smaller than what bfloat16 can show. The average is kept beside the teacher
    and saved with the optimizer. Numbers that somebody else writes to the teacher count.

    What a state dict holds is either the teacher itself, to be saved as a module beside the
    optimizer: `{"teacher": ema.teacher.state_dict(), "optimizer": optimizer.state_dict()}`; or,
    with `in_state=True`, nothing beside: the optimizer's state then has the teacher's parameters
    and the buffers that its own state dict would have, in `torch.distributed.checkpoint`, too.
    Without either, loading warns that the teacher is not the saved one (not
    where it is sharded).

    Unlike `torch.optim.swa_utils.AveragedModel`, whose first update is a copy and which matches
    tensors by their order and averages integers, the teacher is averaged from the first step on;
    the average itself is the same.

    Cost: one pass over the weights. Memory: the teacher, and 4 bytes for each trained weight in
    half precision; `in_state` adds none. State: t.

    Args:
        student: The module that is trained.
        teacher: The module that follows it; None makes a frozen copy of the student. It may have
            another floating dtype. Wrappers of the student's
            (`DistributedDataParallel`, `torch.compile`) are left out of the copy.
        decay: α, between 0 (a copy) and 1 (no change).
        warmup: Whether to start as a plain mean of the weights seen.
        in_state: Whether the optimizer's state dict holds the teacher, too.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the decay does not lie between 0 and 1, if the student cannot be copied, or
            if the teacher does not fit; in `step`, if it fits no longer.

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

    def after_step(self, context: Context) -> None:
        decay = warmed_up(self.decay, self._t) if self.warmup else self.decay
        self._move(1 - decay)
        context.decay = like(decay, context)
