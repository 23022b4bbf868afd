"""Which objective of a step comes first, second, …, also before their names are known."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

import torch

from gradkit.core.context import Context
from gradkit.core.gradients import Gradients


@dataclass(frozen=True)
class Those:
    """A choice of objectives for an oracle's `only`, made when the oracle asks.

    A closure that returns a mapping says what its objectives are called only once it has run.

    Examples:
        >>> "a" in Those(lambda name: name != "b"), "b" in Those(lambda name: name != "b")
        (True, False)
    """

    holds: Callable[[str], bool]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.holds(name)


@dataclass(eq=False)
class Visits:
    """The order in which one step visits its objectives.

    Attributes:
        context: The step's context, which knows their names.
        generator: Draws the order, once for the whole step; None keeps the objectives' own.
        observers: Those of weight 0 that the step has met so far.
    """

    context: Context
    generator: torch.Generator | None
    observers: set[str] = field(default_factory=set)
    _order: tuple[str, ...] | None = field(default=None, repr=False)

    def order(self, only: Container[str] | None) -> tuple[str, ...]:
        """The objectives' names, or those of them that are in `only`."""
        if self._order is None:
            names = self.context.names or ()
            self._order = names
            if self.generator is not None:
                drawn = torch.randperm(len(names), generator=self.generator, device="cpu")
                self._order = tuple(names[k] for k in drawn.tolist())
        return tuple(name for name in self._order if only is None or name in only)

    def is_active(self, name: str, gradients: Gradients) -> bool:
        """Whether an objective has a weight; one that has none is noted as an observer."""
        active = gradients.index(name) in gradients.active
        if not active:
            self.observers.add(name)
        return active
