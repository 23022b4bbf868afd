"""Transforms, which make another oracle of an oracle, and keep state from step to step."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle


class Transform:
    """Turns an oracle into another oracle.

    A subclass overrides `around`, and `after_step` if something is to happen once the base
    optimizer has stepped. `around` is called once per step, so what belongs to one step lives in
    its local variables: random numbers drawn there are the same at displaced points.

    State that outlasts the step is held in two places. `state` takes numbers, strings, lists and
    small tensors; `vectors` takes flat vectors [P], made by `initial_vectors`. Both are saved
    with the optimizer's state. Change them by `context.propose(self, name=value)`, which is
    carried out only if the step is applied.

    Examples:
        >>> class Halve(Transform):
        ...     def around(self, inner, context):
        ...         def oracle(at=None, only=None):
        ...             gradients = inner(at, only)
        ...             return gradients.replace(weights=gradients.weights / 2)
        ...         return oracle
        >>> import gradkit as gk
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), Halve())
        >>> _ = optimizer.step(lambda: weight**2 / 2)
        >>> weight.item()
        0.5
    """

    generator: torch.Generator | None = None
    """The source of this transform's random numbers, if it draws any; saved with its state."""

    @property
    def state(self) -> dict[str, Any]:
        """What outlasts a step: numbers, strings, lists, small tensors."""
        state: dict[str, Any] = self.__dict__.setdefault("_state", {})
        return state

    @property
    def vectors(self) -> dict[str, Tensor]:
        """What outlasts a step, of the length of the flat vector."""
        vectors: dict[str, Tensor] = self.__dict__.setdefault("_vectors", _Vectors())
        return vectors

    @property
    def sets_update(self) -> bool:
        """Whether the result is no weighted sum of the rows, so that no rule can follow."""
        return False

    joins: bool = False
    """Whether what becomes of an objective depends on the others evaluated with it."""

    divides: bool = False
    """Whether the transform evaluates objectives one by one, each at a point of its own."""

    needs_several: bool = False
    """Whether the transform does nothing where a step has one objective."""

    needs_rows: bool = True
    """Whether the transform, or its gate, looks at single objectives' gradients or their products.

    Where no transform does, objectives that are only weighed by their losses are back-propagated
    together, in one pass.
    """

    def belong_to(self, optimizer: object) -> None:
        """Note the optimizer that keeps this transform's state.

        Raises:
            ValueError: If another one, still in use, does.
        """
        self.check_free(optimizer)
        self.__dict__.setdefault("_required", sorted(self.state))
        self.__dict__["_owned_by"] = weakref.ref(optimizer)

    def _owner(self) -> object | None:
        """The optimizer that keeps this transform's state, if it is still in use."""
        owner: object | None = self.__dict__.get("_owned_by", lambda: None)()
        return owner

    def check_free(self, optimizer: object) -> None:
        """Check that no other optimizer keeps this transform's state."""
        owner = self._owner()
        keeps = bool(self.state) or self.generator is not None
        keeps |= type(self).initial_vectors is not Transform.initial_vectors
        if keeps and owner is not None and owner is not optimizer:
            raise ValueError(
                f"{self!r} belongs to another optimizer, which saves its state; make a new one"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owned_by"}

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        """The flat vectors this transform keeps, as they are before the first step.

        Called without gradients at the first step, and again where parameters have changed.
        """
        return {}

    def around(self, inner: Oracle, context: Context) -> Oracle:
        """The oracle that this transform makes of `inner`, for one step."""
        return inner

    def objection(self, losses: Mapping[str, float]) -> str | None:
        """Why this transform cannot work with a step's losses, if it cannot.

        Asked only once the step has turned out not to be finite, to say so in the error.

        Args:
            losses: The first loss of each objective in the step, all of them finite.
        """
        return None

    def before_step(self, context: Context) -> None:
        """Called when everything has been evaluated, before the base optimizer steps.

        Whatever could fail in `after_step` is checked here: raising leaves everything as it was.
        It is called in steps that are applied only.
        """

    def after_load(self) -> None:
        """Called once the optimizer has loaded a state dict; to warn of what does not fit."""

    def after_step(self, context: Context) -> None:
        """Called once the base optimizer has applied the step."""

    def tensors(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Tensors of this transform's own, of any shape and dtype, to be saved with the state.

        By name: the optimizer's parameter that each belongs to, if any, and the tensor.
        """
        return {}

    def check_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Check tensors that `load_tensors` is to be called with.

        Raises:
            ValueError: If they are of something else; nothing is changed then.
        """

    def load_tensors(self, saved: Mapping[str, Tensor], mark: str | None) -> None:
        """Called when state has been loaded, with what `tensors` and `mark` gave when it was saved.

        Args:
            saved: The tensors, to be copied; empty if there were none.
            mark: See `mark`.
        """

    def mark(self) -> str | None:
        """A short text by which to know again what is saved elsewhere; None for nothing."""
        return None


class _Vectors(dict[str, Tensor]):
    """Flat vectors by name. The optimizer's state shows them: an assigned vector is copied."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        kept = self.get(name)
        if kept is None:
            super().__setitem__(name, value)
            return
        if value.shape != kept.shape:
            raise ValueError(
                f"the new vector {name!r} has shape {tuple(value.shape)}; it is to replace one of "
                f"shape {tuple(kept.shape)}"
            )
        with torch.no_grad():
            kept.copy_(value)


Weigh = Callable[[Gradients], Gradients]
"""Gives gradients other weights, from their losses, and their inner products if it asks for them.

It reads nothing of them but `names`, `losses`, `weights`, `active` and `gram()`.
"""


class Reweighing(Transform, ABC):
    """A transform that does nothing but give gradients other weights.

    Those that come first in `wrap` may be asked before the objectives are back-propagated, where
    that saves backward passes (`wrap(rows=)`).

    Examples:
        >>> import gradkit as gk
        >>> class Halve(gk.Reweighing):
        ...     def weigher(self, context):
        ...         return lambda gradients: gradients.reweighted(
        ...             torch.full_like(gradients.weights, 0.5)
        ...         )
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), Halve())
        >>> _ = optimizer.step(lambda: weight**2 / 2)
        >>> weight.item()
        0.5
    """

    @property
    def reweighs(self) -> bool:
        """Whether that holds with the present settings."""
        return True

    @abstractmethod
    def weigher(self, context: Context) -> Weigh:
        """What gives gradients other weights, for one step; called as `around` is."""

    def around(self, inner: Oracle, context: Context) -> Oracle:
        weigh = self.weigher(context)

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            return weigh(inner(at, only))

        return oracle


def leading_reweighings(transforms: Sequence[Transform]) -> list[Reweighing]:
    """The transforms that come first and do nothing but give gradients other weights."""
    found: list[Reweighing] = []
    for transform in transforms:
        if not (isinstance(transform, Reweighing) and transform.reweighs):
            break
        found.append(transform)
    return found
