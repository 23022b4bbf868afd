"""The base class for rules that keep one vector per objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.surgery.inputs import Remembered, RuleInputs, needed
from gradkit.surgery.memory import known_objectives
from gradkit.surgery.rule import Rule, checked_jacobian
from gradkit.surgery.weighing import Remembering, active_rows


class VectorRule(Remembering, Rule):
    """Base class for rules that keep one vector per objective, and small memory.

    In a step the memory is updated by each objective's first evaluation, which is at the step's own
    weights. Evaluations at displaced weights (SAM around the rule) start from the same memory and
    do not change it; during the step this needs one more vector for each objective. In an optimizer
    only applied steps change the memory, which is saved with the optimizer's state. When the rule
    is called alone, each call changes it, and `reset` clears it.

    An objective that takes no part in a step keeps its memory.
    """

    remembers: ClassVar[str]
    """A word for the vectors, which is part of the names under which they are saved."""

    needs_losses: ClassVar[bool] = False

    @abstractmethod
    def renew(
        self,
        row: Float[Tensor, " P"],
        weight: Float[Tensor, ""],
        loss: Float[Tensor, ""],
        old: Float[Tensor, " P"] | None,
        out: Float[Tensor, " P"],
        memory: Mapping[str, Float[Tensor, ""]],
    ) -> Float[Tensor, ""] | None:
        """Write an objective's new vector to `out`.

        Args:
            row: The objective's gradient.
            weight: The factor of gradient and loss.
            loss: The objective's loss.
            old: Its vector so far; None for a new objective.
            out: Memory for the new vector.
            memory: Its small memory.

        Returns:
            A number for `respond`, summed over this rank's part of the vectors; None if `respond`
            needs none.
        """

    @abstractmethod
    def respond(
        self,
        gradients: Gradients,
        active: list[int],
        renewed: Float[Tensor, "K P"],
        learned: Float[Tensor, " K"] | None,
        inputs: RuleInputs,
        memory: Remembered,
    ) -> tuple[Gradients, Remembered]:
        """The changed gradients, and the new small memory.

        Args:
            gradients: The gradients of all objectives.
            active: The indices of the rows that the rule works on.
            renewed: The new vectors of these objectives.
            learned: The results of `renew` for these objectives, summed over ranks.
            inputs: Their names and losses; the Gram matrix holds zeros.
            memory: Their small memory.
        """

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return {self._key(name): layout.zeros() for name in known_objectives(self.state)}

    def _key(self, name: str) -> str:
        return f"{self.remembers}.{name}"

    def reset(self) -> None:
        """Clear the memory of all objectives."""
        self.__dict__.pop("_alone", None)
        # Cleared in place: an optimizer's state shows these vectors, under these names.
        for vector in self.vectors.values():
            vector.zero_()
        known = known_objectives(self.state)
        self.state.update(self.init(len(known)) if known else {})

    def __call__(
        self, jacobian: Float[Tensor, "K P"], losses: Float[Tensor, " K"] | None = None
    ) -> Float[Tensor, " P"]:
        """The direction for a matrix of gradients, one per row.

        Args:
            jacobian: The gradients.
            losses: The objectives' losses, for rules that need them.

        Raises:
            TypeError: If the gradients are not a tensor of floating-point numbers.
            ValueError: If they are not a matrix, or if losses are needed and missing.
        """
        if self.needs_losses:
            losses = needed(losses, self)
        jacobian = checked_jacobian(jacobian)
        names = tuple(map(str, range(len(jacobian))))
        owned = self._owner() is not None
        alone = _Remembered() if owned else self.__dict__.get("_alone", _Remembered())
        if any(not _is_like(vector, jacobian) for vector in alone.vectors.values()):
            alone = _Remembered()
        values = jacobian.new_zeros(len(jacobian)) if losses is None else losses
        result, state, vectors = self._answer(
            Gradients(names, values, jacobian),
            alone,
            alone.state,
            frozenset(names),
            lambda count: torch.empty_like(jacobian[:1].expand(count, -1)),
        )
        if not owned:
            self.__dict__["_alone"] = _Remembered(state, {**alone.vectors, **vectors})
        return result.direction()

    def around(self, inner: Oracle, context: Context) -> Oracle:
        before = _Remembered(self.state, self.vectors)
        proposed = self.state
        evaluated: set[str] = set()

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            nonlocal proposed
            gradients = inner(at, only)
            if self.needs_losses:
                context.require_losses(self, sorted(gradients.names[k] for k in gradients.active))
            # Further evaluations of an objective, at displaced weights, do not change the memory.
            first = frozenset(gradients.names) - evaluated
            evaluated.update(gradients.names)
            result, state, vectors = self._answer(
                gradients, before, proposed, first, lambda count: context.pool.take(count)[0]
            )
            if vectors:
                proposed = state
                context.propose(self, **proposed)
                context.propose_vectors(self, **vectors)
            return result

        return oracle

    def _answer(
        self,
        gradients: Gradients,
        before: _Remembered,
        proposed: dict[str, Any],
        first: frozenset[str],
        take: Callable[[int], Float[Tensor, "K P"]],
    ) -> tuple[Gradients, dict[str, Any], dict[str, Tensor]]:
        """The changed gradients, the new state, and the new vectors.

        Args:
            gradients: The incoming gradients.
            before: The memory at the start of the step.
            proposed: The state proposed by earlier evaluations of the step, which is kept for
                objectives that take no part in this one.
            first: The objectives that are evaluated for the first time in this step.
            take: Allocates memory for a number of vectors.
        """
        active = list(active_rows(self, gradients))
        if not active:
            return gradients, proposed, {}
        names = tuple(gradients.names[k] for k in active)
        weights = gradients.weights[active]
        losses = gradients.losses[active].to(weights)
        empty = weights.new_zeros(len(active), len(active))
        memory = self.recall(names, empty, (), before.state).of_present()
        inputs = RuleInputs(empty, names, losses * weights)
        small = {key: value for key, value in memory.items() if value.dim() == 1}
        renewed = take(len(active))
        learned = []
        for n, (name, k) in enumerate(zip(names, active, strict=True)):
            row, out = gradients.rows[k], renewed[n]
            old = before.vectors.get(self._key(name))
            own = {key: value[n] for key, value in small.items()}
            learned.append(self.renew(row, weights[n], losses[n], old, out, own))
        total = _summed(learned, gradients)
        result, learnt = self.respond(gradients, active, renewed, total, inputs, memory)
        learns = [name in first for name in names]
        changed = self.recall(names, empty, (), proposed).with_present(learnt, learns)
        vectors = {
            self._key(name): out
            for name, out, new in zip(names, renewed, learns, strict=True)
            if new
        }
        return result, changed, vectors


def with_rows(
    gradients: Gradients, active: list[int], renewed: Float[Tensor, "K P"]
) -> Float[Tensor, "N P"]:
    """The rows of all objectives, with new ones for those in `active`; observers' are unchanged."""
    if len(active) == len(gradients.names):
        return renewed
    rows = gradients.rows.clone()
    rows[active] = renewed
    return rows


@dataclass(eq=False)
class _Remembered:
    """A rule's memory: the small state, and the vectors."""

    state: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)


def _is_like(vector: Tensor, rows: Tensor) -> bool:
    """Whether a vector has the length, dtype and device of the rows of a matrix."""
    same = vector.dtype == rows.dtype and vector.device == rows.device
    return same and vector.shape == rows.shape[1:]


def _summed(learned: list[Tensor | None], gradients: Gradients) -> Float[Tensor, " K"] | None:
    """The results of `renew` for each objective, summed over the ranks that hold shards."""
    numbers = [number for number in learned if number is not None]
    if not numbers:
        return None
    total = torch.stack(numbers)
    shards = gradients.storage.shards
    return total if shards is None else shards.add_up(total)
