"""The three nouns and the verb: objective, oracle, gradients, transform.

An *objective* is a named closure that returns a scalar loss. An *oracle* answers with the
objectives' *gradients* at a displaced point. A *transform* turns one oracle into another.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.flat import Layout, Pool, Scope
from gradkit.gram import accumulator, block_grams, cosines, exact_products, gram, norm

Oracle = Callable[..., "Gradients"]
"""`oracle(at=None, only=None) -> Gradients`.

`at` is a flat displacement [P] from the current weights (None: none), which is only read.
`only`, any container of names, says which objectives are back-propagated (None: all).
"""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of K objectives at one point, and what is to be made of them.

    The step is `lr_scale` times the base optimizer's, on `direction()`: `weights @ rows`, or
    `update` where a transform has set it. A row of weight 0 is an observer: it serves cosines
    and gates and takes no part in the direction.

    Attributes:
        names: The objectives' names.
        losses: Their losses [K], detached.
        rows: Their gradients [K, P].
        weights: One weight each [K]; all 1 at first.
        lr_scale: What the learning rate is multiplied by [].
        update: The direction [P] where it is no weighted sum of the rows (elementwise rules,
            rules by parameter tensor), else None.
        layout: Where each parameter lies in the flat vector; needed for scopes only.
        observers: Names whose weight is 0 by declaration; see `observe`.
        reached: K × T flags, which parameters each objective's graph reached; None: all.

    Example:
        >>> rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gradients = Gradients(("a", "b"), torch.zeros(2), rows)
        >>> gradients.direction()
        tensor([2., 2., 2.])
        >>> round(float(gradients.cosine("a", "b")), 4)
        -0.8412
    """

    names: tuple[str, ...]
    losses: Float[Tensor, " K"]
    rows: Float[Tensor, "K P"]
    weights: Float[Tensor, " K"] = None  # type: ignore[assignment]  # filled in below
    lr_scale: Float[Tensor, ""] = None  # type: ignore[assignment]  # filled in below
    update: Float[Tensor, " P"] | None = None
    layout: Layout | None = None
    observers: frozenset[str] = frozenset()
    reached: tuple[tuple[bool, ...], ...] | None = None
    # The tensors as they were made here. While they are still the same ones, unwritten, the host
    # knows what they hold and nothing has to be copied from the device.
    _made_weights: tuple[Tensor, int] | None = field(default=None, repr=False)
    _made_scale: Tensor | None = field(default=None, repr=False)
    _products: dict[tuple[str, bool], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        dtype = accumulator(self.rows.device)
        if self.weights is None:
            weights = torch.ones(len(self.names), dtype=dtype, device=self.rows.device)
            object.__setattr__(self, "weights", weights)
            object.__setattr__(self, "_made_weights", (weights, weights._version))
        if self.lr_scale is None:
            scale = torch.ones((), dtype=dtype, device=self.rows.device)
            object.__setattr__(self, "lr_scale", scale)
            object.__setattr__(self, "_made_scale", scale)

    def replace(self, **changes: Any) -> Gradients:
        """A copy with some attributes changed; inner products are kept unless `rows` changes."""
        if "rows" in changes:
            changes.setdefault("_products", {})
        return dataclasses.replace(self, **changes)

    def observe(self, *names: str) -> Gradients:
        """A copy in which the named rows have weight 0."""
        indices = [self.index(name) for name in names]
        known = self._weights_are_made
        weights = self.weights.clone()
        weights[indices] = 0
        return self.replace(
            weights=weights,
            observers=self.observers | set(names),
            _made_weights=(weights, weights._version) if known else None,
        )

    def without_rows(self) -> Gradients:
        """A copy that knows the rows' Gram matrix but does not keep their memory."""
        products = {("global", False): self.gram()}
        return self.replace(rows=self.rows.new_empty(len(self.names), 0), _products=products)

    def index(self, name: str) -> int:
        """The row of the objective `name`.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self.names:
            raise ValueError(
                f"there is no objective {name!r} here; there are {', '.join(map(repr, self.names))}"
            )
        return self.names.index(name)

    @property
    def active(self) -> tuple[int, ...]:
        """The rows of nonzero weight.

        Reads the weights from the device, unless they are as `observe` or the oracle made them.
        """
        if self._weights_are_made:
            return tuple(k for k, name in enumerate(self.names) if name not in self.observers)
        return tuple(k for k, weight in enumerate(self.weights.tolist()) if weight != 0)

    @property
    def _weights_are_made(self) -> bool:
        made = self._made_weights
        return made is not None and made[0] is self.weights and made[1] == self.weights._version

    @property
    def scales_lr(self) -> bool:
        """Whether a transform has set `lr_scale`."""
        return self._made_scale is not self.lr_scale or self.lr_scale._version != 0

    def gram(self, scope: Scope = "global", *, signs: bool = False) -> Float[Tensor, ...]:
        """The rows' Gram matrix [K, K] in float64; [S, K, K], one a block, with another scope.

        Args:
            scope: "global", or "group" or "tensor" for one matrix per parameter group or tensor.
            signs: Whether to take each number's sign first.
        """
        key = (scope, signs)
        if key not in self._products:
            if scope == "global":
                self._products[key] = gram(self.rows, signs=signs)
            else:
                segments = self.segments(scope)
                self._products[key] = block_grams(self.rows, segments, signs=signs)
        return self._products[key]

    def segments(self, scope: Scope) -> tuple[tuple[int, int], ...]:
        """The column ranges that `scope` treats one by one.

        Raises:
            ValueError: If the gradients have no layout and `scope` is not "global".
        """
        if self.layout is None:
            if scope == "global":
                return ((0, self.rows.shape[1]),)
            raise ValueError(
                f"scope {scope!r} needs to know where the parameters lie; "
                "a bare matrix has only the scope 'global'"
            )
        return self.layout.segments(scope)

    def cosine(self, a: str, b: str, *, signs: bool = False) -> Float[Tensor, ""]:
        """The cosine of two objectives' gradients; 0 if one of them is zero."""
        i, j = self.index(a), self.index(b)
        pair = self.gram(signs=signs)[[[i, i], [j, j]], [[i, j], [i, j]]]
        return cosines(pair)[0, 1]

    def direction(
        self, out: Callable[[], Float[Tensor, " P"]] | None = None
    ) -> Float[Tensor, " P"]:
        """The direction of the step: `update`, or `weights @ rows`.

        The result may share the memory of `rows` or `update`: read it, do not write to it.

        Args:
            out: Returns memory for the result where some is needed.
        """
        if self.update is not None:
            return self.update
        declared = [k for k, name in enumerate(self.names) if name not in self.observers]
        if len(declared) == 1 and self._weights_are_made:
            return self.rows[declared[0]]
        result = out() if out is not None else torch.empty_like(self.rows[0])
        return combine(self.rows, self.weights, declared, result)

    def direction_norm(self, direction: Float[Tensor, " P"] | None = None) -> Float[Tensor, ""]:
        """The Euclidean norm of `direction()`, which may be passed in if it is there already."""
        declared = [name for name in self.names if name not in self.observers]
        if self.update is None and len(declared) == 1 and self._weights_are_made:
            return self.gram()[self.index(declared[0]), self.index(declared[0])].sqrt()
        # wᵀGw would cancel where gradients conflict.
        return norm(self.direction() if direction is None else direction)

    def reached_by_direction(
        self, weights: Sequence[float] | None = None
    ) -> tuple[bool, ...] | None:
        """For each of T parameters, whether the graph of a row of nonzero weight reached it.

        Args:
            weights: The weights, if the host has them; otherwise only observers have weight 0.
        """
        if self.reached is None:
            return None
        rows = [
            flags
            for k, (name, flags) in enumerate(zip(self.names, self.reached, strict=True))
            if name not in self.observers and (weights is None or weights[k] != 0)
        ]
        if not rows:
            return tuple(False for _ in self.reached[0])
        return tuple(any(flags) for flags in zip(*rows, strict=True))


def combine(
    rows: Float[Tensor, "K P"],
    weights: Float[Tensor, " K"],
    indices: Sequence[int],
    out: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Write the weighted sum of the rows `indices` to `out`.

    The other rows are left out rather than multiplied by 0: theirs may be infinite.
    """
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    weights = weights.to(rows.dtype)
    with exact_products(out.device):
        for position, (start, stop) in enumerate(runs):
            matrix = rows[start:stop].T
            if position == 0:
                torch.mv(matrix, weights[start:stop], out=out)
            else:
                torch.addmv(out, matrix, weights[start:stop], out=out)
    return out if runs else out.zero_()


def join(sources: Mapping[str, Gradients], context: Context) -> Gradients:
    """Gradients whose rows come from several evaluations, in the objectives' order.

    Args:
        sources: For each objective, the evaluation its row is taken from.
        context: The step's context, whose pool gives the memory.

    Raises:
        ValueError: If one of them has an `update`, which belongs to one point only.
    """
    if any(part.update is not None for part in sources.values()):
        raise ValueError(
            "gradients of different points cannot be joined after a rule has set the update; "
            "put the transform that displaces before that rule in wrap()"
        )
    names = tuple(name for name in context.names or sources if name in sources)
    taken = [(sources[name], sources[name].index(name)) for name in names]
    rows, _ = context.pool.take(len(names))
    for row, (part, k) in zip(rows, taken, strict=True):
        row.copy_(part.rows[k])
    dtype = functools.reduce(torch.promote_types, (part.losses.dtype for part, _ in taken))
    joined = Gradients(
        names,
        torch.stack([part.losses[k].to(dtype) for part, k in taken]),
        rows,
        layout=context.layout,
        reached=_joined_flags(taken),
    )
    observers = [name for name in names if name in sources[name].observers]
    if all(part._weights_are_made for part, _ in taken):
        return joined.observe(*observers) if observers else joined
    weights = torch.stack([part.weights[k] for part, k in taken])
    return joined.replace(weights=weights, observers=frozenset(observers))


def _joined_flags(rows: Sequence[tuple[Gradients, int]]) -> tuple[tuple[bool, ...], ...] | None:
    flags = [part.reached[k] for part, k in rows if part.reached is not None]
    return tuple(flags) if len(flags) == len(rows) else None


@dataclass(frozen=True)
class Selection:
    """A choice of objectives for an oracle's `only`: `only`, plus `include`, less `exclude`.

    Example:
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
    """

    layout: Layout
    pool: Pool
    base: torch.optim.Optimizer
    names: tuple[str, ...] | None = None
    gradients: Gradients | None = None
    gate: Float[Tensor, ""] | None = None
    decay: Float[Tensor, ""] | None = None
    _proposals: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)

    def propose(self, transform: Transform, **state: Any) -> None:
        """Note new state for `transform`; it takes effect if the step is applied.

        Of several proposals in one step the last one counts.
        """
        self._proposals.setdefault(id(transform), {}).update(state)

    def commit(self, transform: Transform) -> None:
        """Make what was proposed for `transform` its state."""
        for name, value in self._proposals.get(id(transform), {}).items():
            if name in transform.vectors:
                transform.vectors[name].copy_(value)
            else:
                transform.state[name] = value

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


class Transform:
    """Turns an oracle into another oracle.

    A subclass overrides `around`, and `after_step` if something is to happen once the base
    optimizer has stepped. `around` is called once per step, so what belongs to one step lives in
    its local variables: random numbers drawn there are the same at displaced points.

    State that outlasts the step is held in two places. `state` takes numbers, strings, lists and
    small tensors; `vectors` takes flat vectors [P], made by `initial_vectors`. Both are saved
    with the optimizer's state. Change them by `context.propose(self, name=value)`, which is
    carried out only if the step is applied.

    Example:
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

    def belong_to(self, optimizer: object) -> None:
        """Note the optimizer that keeps this transform's state.

        Raises:
            ValueError: If another one, still in use, does.
        """
        owner = self.__dict__.get("_owner", lambda: None)()
        keeps = bool(self.state) or self.generator is not None
        keeps |= type(self).initial_vectors is not Transform.initial_vectors
        if keeps and owner is not None and owner is not optimizer:
            raise ValueError(
                f"{self!r} belongs to another optimizer, which saves its state; make a new one"
            )
        self.__dict__["_owner"] = weakref.ref(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        """The flat vectors this transform keeps, as they are before the first step."""
        return {}

    def around(self, inner: Oracle, context: Context) -> Oracle:
        """The oracle that this transform makes of `inner`, for one step."""
        return inner

    def after_step(self, context: Context) -> None:
        """Called once the base optimizer has applied the step."""
