"""The order in which a step visits its objectives, even before their names are known."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

import torch

from gradkit.core.context import Context
from gradkit.core.gradients import Gradients


@dataclass(frozen=True)
class LazySelection:
    """A choice of objectives for an oracle's `only`, evaluated when the oracle asks for it.

    A closure that returns a mapping shows the names of its objectives only after it has run.

    Args:
        holds: Whether an objective of this name is chosen.

    Examples:
        >>> selection = LazySelection(lambda name: name != "b")
        >>> "a" in selection, "b" in selection
        (True, False)
    """

    holds: Callable[[str], bool]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.holds(name)


@dataclass(eq=False)
class VisitOrder:
    """The order in which one step visits its objectives.

    Attributes:
        context: The step's context, which knows the objectives' names.
        generator: Draws the order, once for the whole step; None keeps the objectives' own order.
        observers: The objectives of weight 0 that the step has visited so far.
    """

    context: Context
    generator: torch.Generator | None
    observers: set[str] = field(default_factory=set)
    _order: tuple[str, ...] | None = field(default=None, repr=False)

    def order(self, only: Container[str] | None) -> tuple[str, ...]:
        """The objectives' names in order, restricted to `only` if it is given."""
        if self._order is None:
            names = self.context.names or ()
            self._order = names
            if self.generator is not None:
                drawn = torch.randperm(len(names), generator=self.generator, device="cpu")
                self._order = tuple(names[k] for k in drawn.tolist())
        return tuple(name for name in self._order if only is None or name in only)

    def is_active(self, name: str, gradients: Gradients) -> bool:
        """Whether an objective's weight is not 0; if it is 0, the objective is an observer."""
        active = gradients.index(name) in gradients.active
        if not active:
            self.observers.add(name)
        return active
