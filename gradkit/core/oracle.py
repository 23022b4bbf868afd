"""The three nouns and the verb: objective, oracle, gradients, transform.

An *objective* is a named closure that returns a scalar loss. An *oracle* answers with the
objectives' *gradients* at a displaced point. A *transform* turns one oracle into another.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout, Pool
from gradkit.core.gradients import Gradients, Parts

Oracle = Callable[..., Gradients]
"""`oracle(at=None, only=None) -> Gradients`.

`at` is a flat displacement [P] from the current weights (None: none), which is only read.
`only`, any container of names, says which objectives are back-propagated (None: all).
"""


@dataclass(frozen=True, eq=False)
class Along:
    """The displacement `factor` times `vector`, before it is computed.

    An oracle that sets `takes_along` can be called at one in place of a flat vector. Weights plus
    displacement are then computed in one pass over memory.

    Attributes:
        vector: A flat vector [P], or one tensor per parameter.
        factor: What it is multiplied by [].
    """

    vector: Float[Tensor, " P"] | Parts
    factor: Float[Tensor, ""] | float

    def parts(self, layout: Layout) -> Parts:
        """The vector, one tensor per parameter."""
        return layout.views(self.vector) if isinstance(self.vector, Tensor) else self.vector


def displacement(
    vector: Float[Tensor, " P"] | Parts,
    factor: Float[Tensor, ""] | float,
    at: Float[Tensor, " P"] | None,
    inner: Oracle,
    context: Context,
) -> Float[Tensor, " P"] | Along:
    """`at + factor·vector`, in the form that `inner` takes best.

    Args:
        vector: A flat vector, or one tensor per parameter; only read.
        factor: What to multiply it by.
        at: Where to start from; None for the weights themselves.
        inner: The oracle that is to be called there.
        context: The step's context, whose pool gives the memory.
    """
    if at is None and takes_along(inner):
        return Along(vector, factor)
    result = context.pool.take_vector()
    if isinstance(vector, Tensor):
        torch.mul(vector, factor, out=result)
    else:
        for view, part in zip(context.layout.views(result), vector, strict=True):
            if part is None:
                view.zero_()
            else:
                torch.mul(part, factor, out=view)
    return result if at is None else result.add_(at)


def takes_along(oracle: Oracle) -> bool:
    """Whether an oracle can be called at an `Along`."""
    return getattr(oracle, "takes_along", False)


Weigh = Callable[[Gradients], Gradients]
"""Gives gradients other weights, from their losses, and their inner products if it asks for them.

An oracle that sets `takes_weigher` can be called with one, as `oracle(at, only, weigh)`. It calls
it before the objectives are back-propagated where that saves backward passes, or else afterwards.
"""

Streams = Literal["no", "may", "must"]
"""Whether objectives are weighed before they are back-propagated, in one pass: if possible, or else
that is an error."""


def reweighing(inner: Oracle, weigh: Weigh) -> Oracle:
    """The oracle of a transform that does nothing but give gradients other weights.

    Args:
        inner: The oracle inside it.
        weigh: Gives gradients other weights; it reads nothing of them but `names`, `losses`,
            `weights`, `active` and `gram()`.
    """

    def oracle(
        at: Float[Tensor, " P"] | Along | None = None,
        only: Container[str] | None = None,
        then: Weigh | None = None,
    ) -> Gradients:
        both = weigh if then is None else _in_turn(weigh, then)
        return inner(at, only, both) if takes_weigher(inner) else both(inner(at, only))

    oracle.takes_along = takes_along(inner)  # type: ignore[attr-defined]  # a function's own
    oracle.takes_weigher = True  # type: ignore[attr-defined]
    return oracle


def _in_turn(first: Weigh, second: Weigh) -> Weigh:
    return lambda gradients: second(first(gradients))


def takes_weigher(oracle: Oracle) -> bool:
    """Whether an oracle can be called with a `Weigh`."""
    return getattr(oracle, "takes_weigher", False)


def check_number(name: str, value: object, *, finite: bool = True) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is NaN, or infinite though it may not be.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; pass a number")
    if value != value or (finite and value in (float("inf"), float("-inf"))):
        raise ValueError(f"{name} is {value}; it must be a finite number")


def join(sources: Mapping[str, Gradients], context: Context) -> Gradients:
    """Gradients whose rows come from several evaluations, in the objectives' order.

    Args:
        sources: For each objective, the evaluation its row is taken from.
        context: The step's context, whose pool gives the memory.

    Raises:
        ValueError: If one of them has an `update`, which belongs to one point only.
    """
    if any(part.has_update for part in sources.values()):
        raise ValueError(
            "gradients of different points cannot be joined after a rule has set the update; "
            "put the transform that displaces before that rule in wrap()"
        )
    names = tuple(name for name in context.names or sources if name in sources)
    taken = [(sources[name], sources[name].index(name)) for name in names]
    rows, views = context.pool.take(len(names))
    for index, (part, k) in enumerate(taken):
        if part.parts is None:
            rows[index].copy_(part.rows[k])
        else:
            copy_parts(part.parts, views[index])
    dtype = functools.reduce(torch.promote_types, (part.losses.dtype for part, _ in taken))
    joined = Gradients(
        names,
        torch.stack([part.losses[k].to(dtype) for part, k in taken]),
        rows,
        layout=context.layout,
        reached=_joined_flags(taken),
    )
    observers = [name for name in names if name in sources[name].observers]
    if all(part.has_unit_weights for part, _ in taken):
        return joined.observe(*observers) if observers else joined
    weights = torch.stack([part.weights[k] for part, k in taken])
    return joined.replace(weights=weights, observers=frozenset(observers))


def copy_parts(parts: Parts, views: Sequence[Tensor]) -> None:
    """Copy a vector's parts to the views of a flat one."""
    there = [t for t, part in enumerate(parts) if part is not None]
    if there:
        sources = [part for part in parts if part is not None]
        torch._foreach_copy_([views[t] for t in there], sources)
    missing = [view for view, part in zip(views, parts, strict=True) if part is None]
    if missing:
        torch._foreach_zero_(missing)


def _joined_flags(rows: Sequence[tuple[Gradients, int]]) -> tuple[tuple[bool, ...], ...] | None:
    flags = [part.reached[k] for part, k in rows if part.reached is not None]
    return tuple(flags) if len(flags) == len(rows) else None


@dataclass(frozen=True)
class Selection:
    """A choice of objectives for an oracle's `only`: `only`, plus `include`, less `exclude`.

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


@dataclass(eq=False)
class Context:
    """What a transform may know of the step it takes part in.

    Attributes:
        layout: Where each parameter lies in the flat vector.
        pool: Memory for flat vectors.
        base: The wrapped optimizer.
        names: The objectives of the step, in order; None until a closure that returns a mapping
            has run for the first time.
        gradients: The evaluation that the step applies; there from `after_step` on.
        gate: Set by a gated transform: 1 aligned, 0 conflict.
        decay: Set by a teacher: the decay it used.
        streams: Whether objectives may be weighed before they are back-propagated.
        by_tensor: Whether a transform takes inner products tensor by tensor; those over all
            parameters are their sum then.
        without_loss: The objectives whose closure returned no loss, but called backward.
        ascended: The parameters in groups with `maximize`, by position in the layout. Their
            gradients are negated as soon as they are known, so that what transforms see is to be
            minimised; where all parameters are such, so are the losses.
    """

    layout: Layout
    pool: Pool
    base: torch.optim.Optimizer
    names: tuple[str, ...] | None = None
    gradients: Gradients | None = None
    gate: Float[Tensor, ""] | None = None
    decay: Float[Tensor, ""] | None = None
    streams: Streams = "no"
    by_tensor: bool = False
    without_loss: set[str] = field(default_factory=set)
    ascended: tuple[int, ...] = ()
    _proposals: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)
    _vectors: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def ascends_everywhere(self) -> bool:
        """Whether all parameters are in groups with `maximize`."""
        return len(self.ascended) == len(self.layout.parameters) and bool(self.ascended)

    def propose(self, transform: Transform, **state: Any) -> None:
        """Note new state for `transform`; it takes effect if the step is applied.

        Of several proposals in one step the last one counts.

        Raises:
            ValueError: If a vector has another shape than the one it is to replace, or if a tensor
                is too large for what is saved as text.
        """
        for name, value in state.items():
            if name not in transform.vectors:
                _check_small(transform, name, value, self.layout.numel)
            kept = transform.vectors.get(name)
            if kept is not None and value.shape != kept.shape:
                raise ValueError(
                    f"{type(transform).__name__} proposed a vector {name!r} of shape "
                    f"{tuple(value.shape)}; it has shape {tuple(kept.shape)}"
                )
        self._proposals.setdefault(id(transform), {}).update(state)

    def propose_vectors(self, transform: Transform, **vectors: Float[Tensor, " P"]) -> None:
        """Note new flat vectors for `transform`, which may be ones it has not had before.

        They are copied when the step is applied. A transform that learns only from a step which
        vectors it keeps must say so in its state, which is loaded first, and have
        `initial_vectors` make them then.
        """
        self._vectors.setdefault(id(transform), {}).update(vectors)

    def proposed(self, transform: Transform) -> dict[str, Any]:
        """What has been proposed for `transform` in this step so far."""
        return dict(self._proposals.get(id(transform), {}))

    def commit(self, transform: Transform) -> None:
        """Make what was proposed for `transform` its state."""
        for name, value in self._proposals.get(id(transform), {}).items():
            if name in transform.vectors:
                transform.vectors[name].copy_(value)
            else:
                transform.state[name] = value
        for name, vector in self._vectors.get(id(transform), {}).items():
            if name in transform.vectors:
                transform.vectors[name].copy_(vector)
            else:
                transform.vectors[name] = vector.clone()

    def require_losses(self, who: Transform, names: Sequence[str]) -> None:
        """Check that the losses of these objectives are known.

        Raises:
            ValueError: If one is not.
        """
        missing = [name for name in names if name in self.without_loss]
        if missing:
            raise ValueError(
                f"{who!r} works on losses, and that of objective {missing[0]!r} is not known: its "
                "closure called backward and returned None, or there was none; return the loss"
            )

    def require(self, who: Transform, *names: str) -> None:
        """Check that the step has these objectives.

        Raises:
            ValueError: If it has not.
        """
        if self.names is None:
            return
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(
                f"{type(who).__name__} needs the objective {missing[0]!r}, but the step has "
                f"{', '.join(map(repr, self.names))}; pass step() a mapping of named objectives"
            )


def _check_small(transform: Transform, name: str, value: object, numel: int) -> None:
    if not isinstance(value, Tensor):
        return
    is_flat = value.shape == (numel,) and numel > 1 << 12
    if is_flat or value.numel() * value.element_size() > 1 << 22:
        raise ValueError(
            f"{type(transform).__name__} proposed a tensor {name!r} of shape "
            f"{tuple(value.shape)} as small state, which is saved as text; return a vector of the "
            "length of the weights from initial_vectors(), or pass it to context.propose_vectors()"
        )


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
        vectors: dict[str, Tensor] = self.__dict__.setdefault("_vectors", {})
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

    @property
    def reweighs(self) -> bool:
        """Whether the transform does nothing but give gradients other weights; see `reweighing`."""
        return False

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
