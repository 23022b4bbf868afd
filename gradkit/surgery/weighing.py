"""The base classes for rules that weight objectives and keep memory from step to step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import combine
from gradkit.core.context import Context
from gradkit.core.flat import Scope
from gradkit.core.gradients import Gradients
from gradkit.core.transform import Reweighing, Transform, Weigh
from gradkit.surgery.host import uploaded
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.memory import Memory, check_remembered, known_objectives


class Remembering(Transform):
    """Base class for transforms that draw random numbers once per step or keep memory.

    The memory is kept for each objective, by name. In an optimizer only applied steps change it,
    and it is saved with the optimizer's state. When the transform is called alone, each call
    changes it, and `reset` clears it.
    """

    def draw(self, count: int) -> Any:
        """The random numbers that one step with `count` objectives needs."""
        return None

    def init(self, count: int) -> dict[str, Tensor]:
        """The initial memory of `count` objectives.

        Returns:
            Tensors of shape [], [K] or [K, K] by name, without batch dimensions.
        """
        return {}

    def reset(self) -> None:
        """Clear the memory of all objectives."""
        for key in self.state:
            self.state[key] = None

    @property
    def state(self) -> dict[str, Any]:
        """The memory, and the objectives in it."""
        if "_state" not in self.__dict__:
            keys = self.init(1)
            self.__dict__["_state"] = dict.fromkeys(("objectives", *keys)) if keys else {}
        state: dict[str, Any] = self.__dict__["_state"]
        return state

    def recall(
        self,
        names: tuple[str, ...],
        like: Tensor,
        batch: Sequence[int],
        state: Mapping[str, Any],
        blocks: Sequence[str] | None = None,
        scope: str | None = None,
    ) -> Memory:
        """The memory of these objectives, in the dtype and on the device of `like`.

        Raises:
            ValueError: If the state was saved with another scope.
        """
        with torch.device("cpu"):  # whatever the default device is
            fresh = self.init(len(known_objectives(state, names)))
        fresh = {key: uploaded(value, like) for key, value in fresh.items()}
        return Memory(self, state, names, fresh, batch, blocks, scope)

    def belong_to(self, optimizer: object) -> None:
        super().belong_to(optimizer)
        # Calls outside an optimizer have numbered the objectives; an optimizer names them.
        if self.__dict__.pop("_learnt_alone", False):
            self.reset()

    @contextmanager
    def called_alone(self) -> Iterator[dict[str, Any]]:
        """A context for a call outside a step; yields the state, which the call may change.

        If the transform belongs to an optimizer, the call starts with an empty state, and neither
        the state nor the generator changes.
        """
        owned = self._owner() is not None
        generator = None if self.generator is None else self.generator.get_state()
        state = {} if owned else dict(self.state)
        try:
            yield state
        finally:
            if owned and generator is not None and self.generator is not None:
                self.generator.set_state(generator)
        if self.state and not owned:
            self.state.update(state)
            self.__dict__["_learnt_alone"] = True


class Weighting(Remembering, Reweighing):
    """Base class for rules that weight objectives by inner products, losses or memory.

    In `wrap` a rule multiplies the weights of the objectives of nonzero weight by its own. With
    `scope` "group" or "tensor", inner products are computed and gradients combined for each
    parameter group or tensor separately. With "shared", inner products are computed over the
    parameters in which at least two objectives have a nonzero gradient, such as a trunk. Parameters
    of a single objective, such as its head, get that objective's gradient unchanged. With these
    scopes the result is not a weighted sum of whole rows, so no other rule can follow.

    In a step the memory is updated by each objective's first evaluation, which is at the step's own
    weights. Evaluations at displaced weights (SAM around the rule) use the same memory and the same
    random numbers, and do not change the memory.
    """

    joins = True
    needs_several = True

    scope: Scope = "global"
    needs_gram: bool = True
    """Whether the weights depend on the Gram matrix; if not, it holds zeros."""

    @property
    def needs_losses(self) -> bool:
        """Whether the weights depend on losses."""
        return False

    def solves(self, count: int) -> bool:
        """Whether the weights of so many objectives are found by a solver or a decomposition.

        The rule is then given its inputs on the host. On an accelerator a solver is hundreds of
        small operations, and the host waits for the results of many of them.
        """
        return False

    @abstractmethod
    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        """The weights, and the new memory.

        Args:
            inputs: The Gram matrix, names and losses of the objectives.
            memory: The memory of these objectives, in the shapes of `init`; read-only.
        """

    @property
    def sets_update(self) -> bool:
        """Whether the rule works per group or tensor, or on shared parameters."""
        return self.scope != "global"

    @property
    def reweighs(self) -> bool:
        """Whether the rule works on whole gradients."""
        return self.scope == "global"

    def weigher(self, context: Context) -> Weigh:
        return _Step(self, context).reweigh

    def seen_losses(
        self, losses: Float[Tensor, " K"], weights: Float[Tensor, " K"]
    ) -> Float[Tensor, " K"]:
        """The losses that the rule works on, for objectives of these weights."""
        return losses.to(weights) * weights

    def weigh_alone(
        self,
        gram: Float[Tensor, "*batch K K"],
        losses: Float[Tensor, " K"] | None = None,
    ) -> Float[Tensor, "*batch K"]:
        """The weights outside a step, for numbered objectives.

        Raises:
            ValueError: If losses are needed and missing, or if `weigh` does not return weights and
                memory.
        """
        count = gram.shape[-1]
        names = tuple(map(str, range(count)))
        given = gram
        if self.solves(count):
            gram, losses = gram.cpu(), None if losses is None else losses.cpu()
        with self.called_alone() as state:
            memory = self.recall(names, gram, gram.shape[:-2], state)
            inputs = RuleInputs(gram, names, losses, losses, self.draw(count))
            weights, learnt = self.checked_weights(inputs, memory.of_present())
            state.update(memory.with_present(learnt))
        return uploaded(weights, given, weights.dtype)

    def checked_weights(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        """The result of `weigh`, checked.

        Raises:
            ValueError: If it is not a pair of weights and memory.
        """
        answer: Any = self.weigh(inputs, memory)
        shape = inputs.gram.shape[:-1]
        is_pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)
        weights = answer[0] if is_pair else answer
        if not is_pair or not isinstance(weights, Tensor) or weights.shape != shape:
            what = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"weigh() of {self!r} returned {what}{'' if is_pair else ' alone'} for Gram "
                f"matrices of shape {tuple(inputs.gram.shape)}; return one weight for each "
                f"objective, a tensor of shape {tuple(shape)}, and what is to be remembered, the "
                "memory that was passed in if nothing changes"
            )
        check_remembered(self, answer[1], memory)
        return answer[0], answer[1]


class _Step:
    """One step's evaluations of a weighting."""

    def __init__(self, rule: Weighting, context: Context) -> None:
        self._rule = rule
        self._context = context
        self._drawn: dict[int, Any] = {}
        self._first_losses: dict[str, Tensor] = {}
        self._evaluated: set[str] = set()

    def reweigh(self, gradients: Gradients) -> Gradients:
        """Gradients with the objectives' weights multiplied by the rule's."""
        rule = self._rule
        seen = active_rows(rule, gradients)
        shared = gradients.shared(seen) if rule.scope == "shared" else None
        active = list(seen if shared is None else shared.rows)
        if not active:
            self._evaluated.update(gradients.names)
            return gradients
        every = len(active) == len(gradients.names)
        old = gradients.weights if every else gradients.weights[active]
        if rule.needs_gram:
            gram = gradients.gram(rule.scope) if shared is None else shared.gram
            chosen = gram if every else gram[..., active, :][..., :, active]
            weighted = old[:, None] * old * chosen
        else:
            weighted = old.new_zeros(len(active), len(active))
        names = tuple(gradients.names[k] for k in active)
        losses = gradients.losses if every else gradients.losses[active]
        inputs = self._inputs(weighted, names, losses.detach(), old)
        found = self._learn(inputs, gradients)
        new = old * uploaded(found, old, found.dtype)
        self._evaluated.update(gradients.names)
        if not every:
            spread = new.new_zeros((*new.shape[:-1], len(gradients.names)))
            spread[..., active] = new
            new = spread
        if rule.scope == "global":
            return gradients.replace(weights=new)
        if shared is None:
            blocks = zip(new, gradients.segments(rule.scope), strict=True)
            parts = [(weights, span, active) for weights, span in blocks]
        else:
            parts = [(new, span, active) for span in shared.spans]
            parts += [(gradients.weights, span, list(seen)) for span in shared.others]
        update = self._context.pool.take_vector()
        for weights, (start, stop), rows in parts:
            combine(gradients.rows[:, start:stop], weights, rows, update[start:stop])
        return gradients.replace(update=update, seen_gram=None if shared is None else shared.gram)

    def _inputs(
        self,
        gram: Float[Tensor, "*batch K K"],
        names: tuple[str, ...],
        losses: Float[Tensor, " K"],
        weights: Float[Tensor, " K"],
    ) -> RuleInputs:
        rule, count = self._rule, len(names)
        if count not in self._drawn:
            self._drawn[count] = rule.draw(count)
        draws, every = self._drawn[count], self._context.names or names
        if rule.solves(count):
            gram = gram.cpu()
        if not rule.needs_losses:
            return RuleInputs(gram, names, None, None, draws, every)
        self._context.require_losses(rule, names)
        seen = rule.seen_losses(losses, weights).to(gram.device)
        for name, loss in zip(names, seen, strict=True):
            self._first_losses.setdefault(name, loss)
        first = torch.stack([self._first_losses[name] for name in names])
        return RuleInputs(gram, names, seen, first, draws, every)

    def _learn(self, inputs: RuleInputs, gradients: Gradients) -> Float[Tensor, "*batch K"]:
        """The weights; proposes the new memory of objectives evaluated for the first time."""
        rule, context, names = self._rule, self._context, inputs.names
        if not rule.state:
            return rule.checked_weights(inputs, {})[0]
        keys, batch = block_keys(rule.scope, context), inputs.gram.shape[:-2]
        scope = rule.scope if rule.needs_gram else None

        def recall(state: Mapping[str, Any]) -> Memory:
            return rule.recall(names, inputs.gram, batch, state, keys, scope)

        memory = recall(rule.state)
        weights, learnt = rule.checked_weights(inputs, memory.of_present())
        first = [name not in self._evaluated for name in names]
        if any(first):
            proposed = context.proposed(rule)
            if proposed:  # by an earlier evaluation of other objectives in this step
                memory = recall({**rule.state, **proposed})
            context.propose(rule, **memory.with_present(learnt, first))
        return weights


def active_rows(rule: Transform, gradients: Gradients) -> tuple[int, ...]:
    """The indices of the rows that a rule works on: those of nonzero weight.

    Raises:
        ValueError: If the update has already been set.
    """
    if gradients.has_update:
        raise ValueError(
            f"{rule!r} cannot follow a transform that has set the update, which is no "
            "weighted sum of whole gradients; put it first in wrap()"
        )
    return gradients.active


def block_keys(scope: Scope, context: Context) -> list[str] | None:
    """Keys of the blocks of a scope, whichever parameters are frozen; None for a single block.

    The keys are the positions of groups, or of tensors in all groups.
    """
    if scope in ("global", "shared"):
        return None
    if scope == "group":
        return [f"group {group}" for group in dict.fromkeys(context.layout.groups)]
    every = (p for group in context.base.param_groups for p in group["params"])
    places = {parameter: place for place, parameter in enumerate(every)}
    return [f"tensor {places[parameter]}" for parameter in context.layout.parameters]
