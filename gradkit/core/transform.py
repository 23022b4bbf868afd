"""Transforms: they turn one oracle into another, and keep state from step to step."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.displacement import Displacement, Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle


class Transform:
    """Turns an oracle into another oracle.

    A subclass overrides `around`, and `after_step` if it has something to do after the base
    optimizer has stepped. `around` is called once per step, so keep what belongs to one step in its
    local variables: random numbers drawn there are the same at displaced points.

    State that is kept from step to step has two places. `state` holds numbers, strings, lists and
    small tensors; `vectors` holds flat vectors [P], made by `initial_vectors`. Both are saved with
    the optimizer's state. Change them with `context.propose(self, name=value)`, which takes effect
    only if the step is applied.

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
    """The generator of this transform's random numbers, if it draws any; saved with its state."""

    @property
    def state(self) -> dict[str, Any]:
        """The small state kept from step to step: numbers, strings, lists, small tensors."""
        state: dict[str, Any] = self.__dict__.setdefault("_state", {})
        return state

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The flat vectors [P] kept from step to step."""
        vectors: dict[str, Tensor] = self.__dict__.setdefault("_vectors", _Vectors())
        return vectors

    @property
    def sets_update(self) -> bool:
        """Whether the result is not a weighted sum of the rows, so that no rule can follow."""
        return False

    joins: bool = False
    """Whether the result for one objective depends on the others evaluated with it."""

    divides: bool = False
    """Whether the transform evaluates objectives one by one, each at a point of its own."""

    needs_several: bool = False
    """Whether the transform does nothing in a step with one objective."""

    needs_rows: bool = True
    """Whether the transform reads single objectives' gradients or their inner products.

    If no transform does, objectives that are weighted by their losses only are back-propagated
    together, in one pass.
    """

    @property
    def per_rank(self) -> bool:
        """Whether each rank evaluates this transform on gradients of its own.

        The result, and the tensors that are proposed on the way, are then averaged over the ranks.
        """
        return False

    replaces_step: bool = False
    """Whether the result is a step of its own, for which a plain gradient is no substitute."""

    @property
    def saved_name(self) -> str:
        """The name under which the state is saved; state of another name is refused."""
        return type(self).__name__

    @property
    def inside(self) -> tuple[Transform, ...]:
        """The transforms that this one holds, and that propose state of their own."""
        return ()

    def belong_to(self, optimizer: object) -> None:
        """Register the optimizer that keeps this transform's state.

        Raises:
            ValueError: If another optimizer, still in use, keeps it.
        """
        self.check_free(optimizer)
        self.__dict__.setdefault("_required", sorted(self.state))
        self.__dict__["_owned_by"] = weakref.ref(optimizer)

    def _owner(self) -> object | None:
        """The optimizer that keeps this transform's state; None if it is no longer in use."""
        owner: object | None = self.__dict__.get("_owned_by", lambda: None)()
        return owner

    def check_free(self, optimizer: object) -> None:
        """Check that no other optimizer keeps this transform's state.

        Raises:
            ValueError: If another optimizer, still in use, keeps it.
        """
        owner = self._owner()
        keeps = bool(self.state) or self.generator is not None
        keeps |= type(self).initial_vectors is not Transform.initial_vectors
        if keeps and owner is not None and owner is not optimizer:
            raise ValueError(
                f"{self!r} belongs to another optimizer, which saves its state; make a new one"
            )

    def __repr__(self) -> str:
        return type(self).__name__

    def __setattr__(self, name: str, value: object) -> None:
        if name == "state":
            raise AttributeError(
                f"the state of {type(self).__name__} cannot be replaced as a whole; assign each "
                "value by its name: self.state[name] = value"
            )
        if name == "vectors":
            raise AttributeError(
                f"the vectors of {type(self).__name__} cannot be replaced as a whole; return them "
                "from initial_vectors(), and propose new values by context.propose(self, ...)"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owned_by"}

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        """The flat vectors that this transform keeps, with their values before the first step.

        Called under `no_grad` at the first step, and again when the layout has changed.
        """
        return {}

    def around(self, inner: Oracle, context: Context) -> Oracle:
        """The oracle that this transform makes of `inner`, for one step."""
        return inner

    def left_out(self, inner: Oracle, context: Context) -> Oracle:
        """The oracle of a step that `Every` makes without this transform; `inner` by default."""
        return inner

    def objection(self, losses: Mapping[str, float]) -> str | None:
        """Why this transform cannot work with a step's losses; None if it can.

        Called only if the step's result is not finite, to explain it in the error.

        Args:
            losses: The first loss of each objective in the step, all of them finite.
        """
        return None

    def before_step(self, context: Context) -> None:
        """Called after all evaluations, before the base optimizer steps.

        Check here whatever could fail in `after_step`: if this raises, the step changes nothing. It
        is called only in steps that are applied.
        """

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved `state`, with what earlier versions of this transform did not save filled in.

        A state that still lacks a name is refused.
        """
        return saved

    def after_load(self) -> None:
        """Called after the optimizer has loaded a state dict; may warn of what does not fit."""

    def after_step(self, context: Context) -> None:
        """Called after the base optimizer has applied the step."""

    def tensors(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Further tensors to save with the state, of any shape and dtype.

        Returns:
            By name: the optimizer's parameter that the tensor belongs to, or None, and the tensor.
        """
        return {}

    def check_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Check saved tensors before `load_tensors` is called with them.

        Raises:
            ValueError: If they do not fit this transform; nothing is changed then.
        """

    def load_tensors(self, saved: Mapping[str, Tensor], mark: str | None) -> None:
        """Load what `tensors` and `mark` returned when the state was saved.

        Args:
            saved: The tensors, which must be copied; empty if there were none.
            mark: The saved fingerprint; see `mark`.
        """

    def mark(self) -> str | None:
        """A fingerprint of what is saved elsewhere, such as a teacher; None for nothing."""
        return None


class _Vectors(dict[str, Tensor]):
    """Flat vectors by name. The optimizer's state shows them: an assigned vector is copied.

    A displacement is written as the flat vector that it stands for.
    """

    def __setitem__(self, name: str, value: Tensor | Displacement) -> None:
        kept = self.get(name)
        if isinstance(value, Displacement):
            with torch.no_grad():
                value.flat(kept)
            return
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
"""Reweights gradients, by their losses and, if it needs them, by their inner products.

It reads only `names`, `losses`, `weights`, `active` and `gram()`.
"""


class Reweighing(Transform, ABC):
    """A transform that only changes the weights of gradients.

    If it comes first in `wrap`, it may be called before the objectives are back-propagated, where
    that saves backward passes (`wrap(rows=)`).

    `weigher` returns a function that takes `Gradients` and returns a copy with other weights, as
    `gradients.reweighted(factors)` makes one. Observers' weights stay 0, whatever their factors.

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

    never_zero: bool = False
    """Whether no weight is ever made 0, so that all objectives are back-propagated."""

    @property
    def reweighs(self) -> bool:
        """Whether the transform only changes weights, with its present settings."""
        return True

    @abstractmethod
    def weigher(self, context: Context) -> Weigh:
        """The function that reweights gradients; called once per step, like `around`.

        Returns:
            A function from `Gradients` to a copy with other weights. It may be called several
            times in a step, with all of the objectives or some of them.
        """

    def around(self, inner: Oracle, context: Context) -> Oracle:
        weigh = self.weigher(context)

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            return weigh(inner(at, only))

        return oracle


def leading_reweighings(transforms: Sequence[Transform]) -> list[Reweighing]:
    """The transforms at the start of the chain that only change weights."""
    found: list[Reweighing] = []
    for transform in transforms:
        if not (isinstance(transform, Reweighing) and transform.reweighs):
            break
        found.append(transform)
    return found
