"""A mean teacher whose decay depends on the angle between two gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.core.caller import caller_level
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.gram import block_grams, cosines
from gradkit.core.oracle import Oracle, Selection
from gradkit.core.ranks import Shards, local, reshard
from gradkit.core.storage import Parts
from gradkit.core.unwrapping import unwrapped
from gradkit.teachers.decay import check_decay
from gradkit.teachers.following import Buffers
from gradkit.teachers.mean_teacher import MeanTeacher

Measure = Literal["sign_cosine", "cosine"]
Chosen = Callable[[str, nn.Parameter], bool]
"""Whether the gate looks at a parameter, by its name in the student and the parameter."""


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
    The step's record has `gate`, `gate_cosine`, `gate_rate` and `decay`.

    Without `wrap`, from gradients at hand: `gate` before the student's step, and `update` after it;
    `state_dict` saves the teacher with its averages and counters.

    Cost: no gradient beyond the two objectives' own; the cosine, and one pass over the weights.
    Memory: that of `EMA`. State: t, the number of aligned steps, and the step after which they are
    counted: 0, or that of a loaded state of a version that did not count them. `gate_rate` is the
    share of aligned steps among those counted.

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
        only: Which of the student's parameters the gate looks at, as a function of name and
            parameter; None for all. The teacher follows all of them.
        buffers: What the teacher's buffers do; see `EMA`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, if the student cannot be copied, or if the
            teacher does not fit; in `step`, if it no longer fits or a decay has left its range.

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
    only: Chosen | None = None
    buffers: Buffers = "copy"

    def __post_init__(self) -> None:
        self._check_decays()
        if self.measure not in ("sign_cosine", "cosine"):
            raise ValueError(f"measure is {self.measure!r}; choose 'sign_cosine' or 'cosine'")
        check_number("threshold", self.threshold, finite=False)
        if len(self.between) != 2 or self.between[0] == self.between[1]:
            raise ValueError(f"between is {self.between!r}; name two different objectives")
        if self.only is not None and not callable(self.only):
            raise TypeError(
                f"only is {self.only!r}; pass a function of a parameter's name and the parameter"
            )
        self._begin()
        self._spans(self._trained())
        self.state["aligned"] = 0.0
        self.state["counted_from"] = 0
        self._gate: Tensor | None = None  # this step's, from its first evaluation

    # In a step of an optimizer made by `wrap`.

    def around(self, inner: Oracle, context: Context) -> Oracle:
        self._gate = None

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            context.require(self, *self.between)
            if self._gate is not None:
                return inner(at, only)
            gradients = inner(at, Selection(only, include=tuple(self.between)))
            context.require(self, *self.between)
            context.gate_cosine = self._cosine(gradients)
            self._gate = context.gate = self._opened(context.gate_cosine)
            return gradients

        return oracle

    def before_step(self, context: Context) -> None:
        self._check_decays()
        super().before_step(context)

    def after_step(self, context: Context) -> None:
        assert self._gate is not None  # set by the first evaluation
        context.decay = self._follow(self._gate)
        context.gate_rate = self.state["aligned"] / (self.state["t"] - self.state["counted_from"])

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved state; what earlier versions did not count is counted from now on."""
        first = 0 if "aligned" in saved else saved.get("t", 0)
        # In the order of a new state: ranks compare the saved text.
        return {**saved, "aligned": 0.0, "counted_from": first, **saved}

    def after_load(self) -> None:
        """Warn if the teacher is not the saved one, or if earlier steps were not counted."""
        super().after_load()
        if self.state["counted_from"] == self.state["t"] > 0:
            warnings.warn(
                f"the loaded state of {type(self).__name__} does not say how many of its "
                f"{self.state['t']} steps were aligned; gate_rate counts from the next step on, "
                "and the teacher goes on as before",
                UserWarning,
                stacklevel=caller_level(),
            )

    def _cosine(self, gradients: Gradients) -> Float[Tensor, ""]:
        if self.measure == "cosine" and self.only is None:
            return gradients.cosine(*self.between)
        # Only the two rows: others' signs are of no use to anyone.
        first, last = sorted(map(gradients.index, self.between))
        rows = gradients.rows[first : last + 1 : last - first]
        layout = gradients.layout
        spans = ((0, rows.shape[1]),) if layout is None else self._spans(layout.parameters)
        return self._cosine_of(rows, spans, gradients.storage.shards)

    # From gradients at hand.

    def gate(
        self, source: Float[Tensor, " P"] | Parts, target: Float[Tensor, " P"] | Parts
    ) -> Float[Tensor, ""]:
        """Compare two gradients, before the student's step; for use without `wrap`.

        On several processes pass the averaged gradients, which are the same everywhere; shards of
        `fully_shard` are summed up here. Gradients scaled by a `GradScaler` need not be unscaled.
        NaNs are not looked for.

        Args:
            source: The gradient of the first objective with respect to the student's parameters
                that require a gradient: one tensor for each, in the order of
                `student.parameters()`, or None where it is 0; or all of them as one flat vector.
            target: The gradient of the second objective.

        Returns:
            The gate []: 1 if they are aligned, 0 if in conflict.

        Raises:
            ValueError: If the gradients do not have the parameters' shapes, if they share memory,
                as where both are the parameters' `.grad`, or if `only` chooses none of these
                parameters.

        Examples:
            >>> import torch, gradkit as gk
            >>> student = torch.nn.Linear(2, 1, bias=False)
            >>> gated = gk.GatedEMA(student)
            >>> base = torch.optim.SGD(student.parameters(), lr=0.1)
            >>> losses = student(torch.eye(2)).square()
            >>> a, b = (torch.autograd.grad(x, [student.weight], retain_graph=True) for x in losses)
            >>> student.weight.grad = a[0] + b[0]
            >>> gate = gated.gate(a, b)
            >>> base.step()
            >>> gated.update(gate)
            tensor(0.5000, dtype=torch.float64)
        """
        parameters = self._trained()
        spans = self._spans(parameters)
        if source is not target and _share_memory(source, target):
            raise ValueError(
                f"the gradients of {self.between[0]!r} and {self.between[1]!r} share memory, as "
                "where both are the parameters' .grad, to which each backward() adds; take them by "
                "torch.autograd.grad(), or clone .grad and clear it in between"
            )
        rows = [
            _flat(name, gradient, parameters)
            for name, gradient in zip(self.between, (source, target), strict=True)
        ]
        return self._opened(self._cosine_of(torch.stack(rows), spans, Shards.of(parameters)))

    def update(self, gate: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Move the teacher, after the student's step; for use without `wrap`.

        Args:
            gate: What `gate` returned before the step.

        Returns:
            The decay α_t [].

        Raises:
            RuntimeError: If an optimizer made by `wrap` updates this teacher.
            ValueError: If the gate is not a floating-point tensor without dimensions, if a decay is
                no longer between 0 and 1, or if the teacher no longer fits the student; nothing is
                changed then.
        """
        if self._owner() is not None:
            raise RuntimeError(
                "this teacher belongs to an optimizer made by gk.wrap(), whose step() updates it; "
                "make another GatedEMA for a loop of your own"
            )
        if not isinstance(gate, Tensor) or gate.shape != () or not gate.is_floating_point():
            raise ValueError(f"gate is {gate!r}; pass what gate() returned before the step")
        self._check_decays()
        with torch.no_grad():
            return self._follow(gate)

    def state_dict(self) -> dict[str, Any]:
        """The teacher, its float32 averages and the counters, for use without `wrap`.

        Returns:
            Tensors and plain values, which `torch.load(..., weights_only=True)` reads. They are not
            copies.
        """
        return {
            "teacher": unwrapped(self.teacher).state_dict(),
            "averages": dict(self._following.shadows),
            "counters": dict(self.state),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take over what `state_dict` returned, for use without `wrap`.

        Raises:
            RuntimeError: If an optimizer made by `wrap` saves and loads this state, or if the
                teacher is of another model.
            ValueError: If it is no state of a `GatedEMA`; nothing is changed then.
        """
        if self._owner() is not None:
            raise RuntimeError(
                "this teacher belongs to an optimizer made by gk.wrap(), whose state_dict() has "
                "these counters and averages; load that, and pass in_state=True to have the "
                "teacher in it"
            )
        parts = ("teacher", "averages", "counters")
        if state_dict.keys() != {*parts} or state_dict["counters"].keys() != self.state.keys():
            raise ValueError(
                f"a state with {', '.join(map(repr, state_dict))} is no state of GatedEMA; pass "
                "what state_dict() returned"
            )
        unwrapped(self.teacher).load_state_dict(state_dict["teacher"])
        averages = {f"shadow.{name}": each for name, each in state_dict["averages"].items()}
        self.load_tensors(averages, mark=None)
        self.state.update(state_dict["counters"])

    def _check_decays(self) -> None:
        check_decay("decay_aligned", self.decay_aligned)
        if self.decay_conflict is not None:
            check_decay("decay_conflict", self.decay_conflict)

    def _trained(self) -> list[nn.Parameter]:
        reshard(self.student.modules())
        return [each for each in unwrapped(self.student).parameters() if each.requires_grad]

    def _spans(self, parameters: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        """The column ranges of the parameters that the gate looks at; adjacent ones are merged."""
        offsets = [0]
        for parameter in parameters:
            offsets.append(offsets[-1] + local(parameter).numel())
        if self.only is None:
            return ((0, offsets[-1]),)
        reshard(self.student.modules())
        named = unwrapped(self.student).named_parameters()
        chosen = {id(parameter) for name, parameter in named if self.only(name, parameter)}
        spans: list[tuple[int, int]] = []
        for parameter, (start, stop) in zip(parameters, pairwise(offsets), strict=True):
            if id(parameter) in chosen:
                if spans and spans[-1][1] == start:
                    start = spans.pop()[0]
                spans.append((start, stop))
        if not spans:
            raise ValueError(
                f"only={self.only!r} chooses none of the {len(parameters)} parameters that are "
                "trained, so that there would be no gradients to compare; check the names that it "
                "expects against student.named_parameters()"
            )
        return tuple(spans)

    def _cosine_of(
        self,
        rows: Float[Tensor, "2 P"],
        spans: Sequence[tuple[int, int]],
        shards: Shards | None,
    ) -> Float[Tensor, ""]:
        signs = self.measure == "sign_cosine"
        return cosines(block_grams(rows, spans, signs=signs, over=shards).sum(0))[0, 1]

    def _opened(self, cosine: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return ((cosine > self.threshold) != self.invert).to(cosine.dtype)

    def _follow(self, gate: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Move the teacher and count the step; returns the decay."""
        aligned = self._present(self.decay_aligned)
        conflict = 1.0 if self.decay_conflict is None else self._present(self.decay_conflict)

        def chosen(if_aligned: float, if_conflict: float) -> Float[Tensor, ""]:
            return torch.where(gate > 0, torch.full_like(gate, if_aligned), if_conflict)

        # 1 − α is computed in double precision, before it becomes a tensor.
        self._move(chosen(1 - aligned, 1 - conflict))
        self.state["aligned"] = self.state["aligned"] + gate
        return chosen(aligned, conflict)


def _share_memory(source: Float[Tensor, " P"] | Parts, target: Float[Tensor, " P"] | Parts) -> bool:
    """Whether a part of one gradient is the same memory as that of the other."""
    one, other = ([each] if isinstance(each, Tensor) else list(each) for each in (source, target))
    return any(
        a is not None
        and b is not None
        and a.numel() > 0
        and local(a).data_ptr() == local(b).data_ptr()
        for a, b in zip(one, other, strict=False)
    )


def _flat(
    name: str, gradient: Float[Tensor, " P"] | Parts, parameters: Sequence[Tensor]
) -> Float[Tensor, " P"]:
    """A gradient as one flat vector of this rank's elements.

    Raises:
        ValueError: If it does not have the parameters' shapes.
    """
    parts: list[Any] = [local(parameter) for parameter in parameters]
    if isinstance(gradient, Tensor):
        if gradient.shape != (sum(part.numel() for part in parts),):
            raise ValueError(
                f"the gradient of {name!r} has shape {tuple(gradient.shape)} and the student "
                f"{sum(part.numel() for part in parts)} elements in parameters that require a "
                "gradient; pass a flat vector of these, or a list with one tensor per parameter"
            )
        return gradient.detach()
    given = [None if each is None else local(each).detach() for each in gradient]
    if len(given) != len(parts):
        raise ValueError(
            f"the gradient of {name!r} has {len(given)} tensors and the student {len(parts)} "
            "parameters that require a gradient; pass one tensor, or None, for each"
        )
    for position, (part, own) in enumerate(zip(given, parts, strict=True)):
        if part is not None and part.shape != own.shape:
            raise ValueError(
                f"tensor {position} of the gradient of {name!r} has shape {tuple(part.shape)} and "
                f"its parameter {tuple(own.shape)}; pass them in the order of student.parameters()"
            )
    whole = zip(given, parts, strict=True)
    flat = [(torch.zeros_like(own) if part is None else part).reshape(-1) for part, own in whole]
    return torch.cat(flat)
