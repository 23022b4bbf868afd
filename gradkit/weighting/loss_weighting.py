"""What the weightings of objectives by their losses have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.gradients import Gradients
from gradkit.core.gram import accumulator
from gradkit.core.transform import Reweighing, Weigh
from gradkit.surgery.given import Given
from gradkit.surgery.remembering import Remembering
from gradkit.surgery.rule import checked_losses


@dataclass(eq=False)
class SeenInStep:
    """What a weighting has drawn and learnt in one step so far.

    Attributes:
        draws: What `draw` drew, by the number of objectives.
        names: The objectives whose first losses in the step have been learnt from.
        before: What the weighting remembered when the step began.
        state: What it is to remember instead.
    """

    before: dict[str, Any]
    state: dict[str, Any]

    draws: dict[int, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


class LossWeighting(Remembering, Reweighing):
    """Weights objectives by a function of their losses, and of what it remembers of them by name.

    Usable in two ways: in `wrap`, and alone on losses, `weighting(losses) -> weights [K]`.

    In `wrap` it multiplies the objectives' weights by its own. It sees the raw losses Lᵢ of the
    objectives of nonzero weight, and no observers. It can come after rules of surgery and before
    them, but not after a transform that sets the update.

    A step learns from each objective's first loss in it, which is that at the step's own weights:
    further ones, at displaced weights (SAM around this), change nothing that is remembered. The
    weights there are computed from the losses there, where they depend on them, and from the same
    random numbers and the same memory. In an optimizer only applied steps change what is
    remembered, and it is saved with the optimizer's state. Alone, each call does; `reset` forgets.

    Where nothing in the chain looks at single gradients, and one closure returns all losses, the
    weighted sum is back-propagated in one pass (`wrap(rows=)`).

    A closure that calls backward itself must return its loss. Where several ranks train together,
    losses are the ranks' means.
    """

    needs_rows = False
    joins = True
    needs_several = True

    @abstractmethod
    def weigh(self, losses: Float[Tensor, " K"], given: Given) -> Float[Tensor, " K"]:
        """The weights for losses.

        Args:
            losses: The losses, here or at displaced weights.
            given: What there is beside them; `given.memory` is what was remembered before this
                step and `given.remembered` what this step has learnt. It is only read.
        """

    def learn(self, losses: Float[Tensor, " K"], given: Given) -> dict[str, Tensor]:
        """What is to be remembered instead, once a step's first losses are known.

        Args:
            losses: Each objective's first loss in the step.
            given: What there is beside them; `given.memory` is what is remembered so far.
        """
        return {}

    @torch.no_grad()
    def __call__(self, losses: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """The weights for losses, as constants: nothing is differentiated.

        Args:
            losses: The objectives' losses.
        """
        losses = checked_losses(losses)
        names = tuple(map(str, range(len(losses))))
        with self._called_alone() as state:
            seen = SeenInStep(before=dict(state), state=dict(state))
            weights = self._weights(losses.to(accumulator(losses.device)), names, seen)
            state.update(seen.state)
        return weights.to(losses.dtype)

    def begin(self) -> SeenInStep:
        """What `reweigh` needs to know of a step that begins."""
        return SeenInStep(before=dict(self.state), state=dict(self.state))

    def weigher(self, context: Context) -> Weigh:
        seen = self.begin()

        def weigh(gradients: Gradients) -> Gradients:
            if gradients.has_update:
                raise ValueError(
                    f"{self!r} cannot follow a transform that has set the update, in which the "
                    "objectives can no longer be told apart; put it first in wrap()"
                )
            return self.reweigh(gradients, context, seen)

        return weigh

    def reweigh(self, gradients: Gradients, context: Context, seen: SeenInStep) -> Gradients:
        """Gradients with the objectives' weights multiplied by this weighting's own.

        Of the gradients only names, losses and weights are read.

        Args:
            gradients: The objectives' gradients.
            context: The step's context, to which new state is proposed.
            seen: What `begin` returned in this step; it is brought up to date.
        """
        active = list(gradients.active)
        if not active:
            return gradients
        every = len(active) == len(gradients.names)
        losses = gradients.losses if every else gradients.losses[active]
        old = gradients.weights if every else gradients.weights[active]
        names = tuple(gradients.names[k] for k in active)
        context.require_losses(self, names)
        new = old * self._weights(losses.detach().to(old), names, seen)
        if self.state:
            context.propose(self, **seen.state)
        if not every:
            spread = new.new_zeros(len(gradients.names))
            spread[active] = new
            new = spread
        return gradients.replace(weights=new)

    def _weights(
        self, losses: Float[Tensor, " K"], names: tuple[str, ...], seen: SeenInStep
    ) -> Float[Tensor, " K"]:
        count = len(names)
        if count not in seen.draws:
            seen.draws[count] = self.draw(count)
        given = Given(seen.draws[count], losses, names)
        if self.state:
            self._learn_first(losses, names, seen)
            given.memory = self._recall(names, losses, (), seen.before).of_present()
            given.remembered = self._recall(names, losses, (), seen.state).of_present()
        return self.weigh(losses, given)

    def _learn_first(
        self, losses: Float[Tensor, " K"], names: tuple[str, ...], seen: SeenInStep
    ) -> None:
        """Learn from the losses of objectives that this step has not shown before."""
        new = [k for k, name in enumerate(names) if name not in seen.names]
        if not new:
            return
        if len(new) < len(names):
            losses, names = losses[new], tuple(names[k] for k in new)
        memory = self._recall(names, losses, (), seen.state)
        given = Given(losses=losses, names=names, memory=memory.of_present())
        seen.state = memory.with_present(self.learn(losses, given))
        seen.names.update(names)


def check_count(name: str, value: object, least: int) -> None:
    """Check a number of steps given by a user.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; pass a whole number of steps")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
