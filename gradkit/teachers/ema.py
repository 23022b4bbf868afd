"""A mean teacher with a constant decay."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from gradkit.core.context import Context
from gradkit.teachers.decay import check_decay, like
from gradkit.teachers.following import Buffers
from gradkit.teachers.mean_teacher import MeanTeacher


@dataclass(eq=False)
class EMA(MeanTeacher):
    """A mean teacher ([Tarvainen & Valpola, NeurIPS 2017](https://arxiv.org/abs/1703.01780)).

    After each applied step, with θ the student's new weights:

        α_t = min(1 − 1/(t+1), decay) with warm-up, else decay        t = 1, 2, …
        teacher ← α_t·teacher + (1 − α_t)·θ

    Tensors are matched by name. Buffers, unless `buffers` says otherwise, and integer and boolean
    weights are copied and not averaged; copied buffers take the student's present shape and dtype.
    A frozen weight that teacher and student share is not changed. Parameters, buffers and
    submodules that the student gets later are copied, and buffers that it loses are dropped. If the
    teacher cannot follow (a parameter has changed its shape, or was removed), the step raises
    before the student moves.

    Weights in half precision are averaged in float32 and then rounded, since at a decay of 0.999
    most changes are below the resolution of bfloat16. The float32 average is kept beside the
    teacher and saved with the optimizer. If other code writes to the teacher, the average continues
    from these values.

    `decay` may be changed between steps, for a schedule. A teacher that predicts in training mode
    inside a closure updates its own buffers in each evaluation, unless `model=` of `wrap` holds it,
    too: `model=torch.nn.ModuleList([student, teacher])`.

    There are two ways to save a teacher. Either save it as a module beside the optimizer:
    `{"teacher": ema.teacher.state_dict(), "optimizer": optimizer.state_dict()}`. Or pass
    `in_state=True`: the optimizer's state then includes the teacher's parameters and saved buffers,
    also in `torch.distributed.checkpoint`. Otherwise loading warns that the teacher is not the
    saved one (except for a sharded teacher).

    `torch.optim.swa_utils.AveragedModel` copies the weights in its first update, matches tensors by
    their order and averages integers. Here the teacher is averaged from the first step on; the
    average itself is the same.

    Cost: one pass over the weights. Memory: the teacher, and 4 bytes for each trained weight in
    half precision; `in_state` adds none. State: t.

    Args:
        student: The module that is trained.
        teacher: The module that follows it; None makes a frozen copy of the student, without
            wrappers (`DistributedDataParallel`, `torch.compile`). A teacher may have another
            floating-point dtype.
        decay: α, between 0 (a copy) and 1 (no change).
        warmup: Whether to start as a plain mean of the student's weights.
        in_state: Whether the optimizer's state dict includes the teacher.
        buffers: What the teacher's buffers do when it moves: "copy" the student's; "average" them
            like weights, where they are floating-point numbers of at least 32 bits, and copy the
            others; or "skip", stay as they are.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the decay is not between 0 and 1, if the student cannot be copied, or if the
            teacher does not fit; in `step`, if one of these no longer holds.

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
    buffers: Buffers = "copy"
    needs_rows = False

    def __post_init__(self) -> None:
        check_decay("decay", self.decay)
        self._begin()

    def before_step(self, context: Context) -> None:
        check_decay("decay", self.decay)  # a schedule may have changed it
        super().before_step(context)

    def after_step(self, context: Context) -> None:
        decay = self._present(self.decay)
        self._move(1 - decay)
        context.decay = like(decay, context)
