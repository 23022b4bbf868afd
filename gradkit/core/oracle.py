"""Oracles: functions from a point near the weights to the objectives' gradients there."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients


@runtime_checkable
class Oracle(Protocol):
    """`oracle(at, only)`: the objectives' gradients at the weights plus `at`.

    `at` is a displacement or a flat vector [P], which is only read; None stands for the weights
    themselves. `only`, any container of names, chooses the objectives to back-propagate; None
    stands for all.
    """

    def __call__(
        self,
        at: Point | None = None,
        only: Container[str] | None = None,
    ) -> Gradients: ...


@dataclass(frozen=True)
class Selection:
    """A choice of objectives for an oracle's `only`: `only` and `include`, without `exclude`.

    Examples:
        >>> [name in Selection(None, exclude=("a",)) for name in ("a", "b")]
        [False, True]
        >>> [name in Selection(("a",), include=("b",)) for name in ("a", "b", "c")]
        [True, True, False]
    """

    only: Container[str] | None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        if name in self.include:
            return True
        return name not in self.exclude and (self.only is None or name in self.only)
