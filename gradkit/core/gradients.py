"""Gradients of several objectives at one point, and the direction made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import combine
from gradkit.core.displacement import LazySum
from gradkit.core.flat import Layout, Scope
from gradkit.core.gram import accumulator, cosines, norm
from gradkit.core.storage import Dense, Parts, Spent, Storage, Summed


class Shared(NamedTuple):
    """The parameters that several objectives share.

    Attributes:
        rows: The rows that have a gradient in at least one shared parameter.
        gram: The Gram matrix [K, K] of all rows over the shared parameters.
        tensors: The positions of the shared parameters.
        spans: Their column ranges; adjacent ones are merged.
        others: The column ranges of all other parameters.
    """

    rows: tuple[int, ...]
    gram: Float[Tensor, "K K"]
    tensors: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]


class Measurement(NamedTuple):
    """What one evaluation has found, without the gradients themselves.

    Attributes:
        names: The objectives.
        losses: Their losses [K].
        gram: The Gram matrix [K, K] of their gradients.
    """

    names: tuple[str, ...]
    losses: Float[Tensor, " K"]
    gram: Float[Tensor, "K K"]

    def as_gradients(self) -> Gradients:
        """Gradients without columns, whose inner products are these."""
        empty = self.losses.new_empty(len(self.names), 0)
        return Gradients(self.names, self.losses, Dense(empty, gram=self.gram))


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Gradients:
    """Gradients of K objectives at one point, and the direction made of them.

    The base optimizer steps along `direction()`, with its learning rate times `lr_scale`. The
    direction is `weights @ rows`, or `update` where a transform has set it. A row of weight 0 is
    an observer: it is used for cosines and gates, and takes no part in the direction.

    Gradients are immutable: `reweighted`, `with_update`, `with_lr_scale`, `observe` and `replace`
    return changed copies. Do not write to the tensors.

    Attributes:
        names: The objectives' names.
        losses: Their losses [K], detached.
        storage: How their gradients are stored.
        observers: The objectives whose weight is 0 by declaration; see `observe`.
        reached: K × T flags: whether each objective's graph reached each parameter; None for all.
        parameter_names: The names of the T parameters; None if they are not known.

    Args:
        names: The objectives' names.
        losses: Their losses.
        rows: Their gradients [K, P], or the storage of their gradients.
        weights: One weight for each objective; None for 1, and 0 for observers.
        lr_scale: The factor of the learning rate; None for 1.
        update: The direction where it is not a weighted sum of the rows: a flat vector, or a
            storage of one row.
        layout: Where each parameter lies in the flat vector; needed with a matrix of rows, and only
            for scopes other than "global".
        observers: The objectives whose weight is 0.
        reached: Whether each objective's graph reached each parameter.
        parameter_names: The parameters' names.
        seen_gram: The Gram matrix that a rule on shared parameters has used.
        bound: An upper bound of the norm of `update`; None if it is not known.

    Examples:
        >>> rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gradients = Gradients(("a", "b"), torch.zeros(2), rows)
        >>> gradients.direction()
        tensor([2., 2., 2.])
        >>> gradients.reweighted(torch.tensor([1.0, 0.5])).direction()
        tensor([-1.0000,  1.5000,  1.5000])
        >>> round(float(gradients.cosine("a", "b")), 4)
        -0.8412
    """

    names: tuple[str, ...]
    losses: Float[Tensor, " K"]
    storage: Storage
    observers: frozenset[str]
    reached: tuple[tuple[bool, ...], ...] | None
    parameter_names: tuple[str | int, ...] | None
    # None where the host knows the values: 1, and 0 for observers.
    _weights: Float[Tensor, " K"] | None
    _lr_scale: Float[Tensor, ""] | None
    _update: Float[Tensor, " P"] | Storage | None
    # An upper bound of the norm of `_update`.
    _bound: Float[Tensor, ""] | None
    # Of a rule on shared parameters, which ignores all other parameters.
    _seen_gram: Float[Tensor, "K K"] | None

    def __init__(
        self,
        names: tuple[str, ...],
        losses: Float[Tensor, " K"],
        rows: Float[Tensor, "K P"] | Storage,
        weights: Float[Tensor, " K"] | None = None,
        lr_scale: Float[Tensor, ""] | None = None,
        update: Float[Tensor, " P"] | Storage | None = None,
        layout: Layout | None = None,
        observers: frozenset[str] = frozenset(),
        reached: tuple[tuple[bool, ...], ...] | None = None,
        parameter_names: tuple[str | int, ...] | None = None,
        seen_gram: Float[Tensor, "K K"] | None = None,
        bound: Float[Tensor, ""] | None = None,
    ) -> None:
        vars(self).update(  # since the class is frozen
            names=names,
            losses=losses,
            storage=Dense(rows, layout) if isinstance(rows, Tensor) else rows,
            observers=observers,
            reached=reached,
            parameter_names=parameter_names,
            _weights=weights,
            _lr_scale=lr_scale,
            _update=update,
            _seen_gram=seen_gram,
            _bound=bound,
        )

    def replace(self, **changes: Any) -> Gradients:
        """A copy with some of the constructor's arguments changed.

        Inner products that have been computed are kept unless `rows` changes.

        Raises:
            ValueError: If a matrix of rows is given, and the direction is an `update`, in which
                they would not count.
        """
        rows: Storage | Tensor = self.storage
        if isinstance(changes.get("rows"), Tensor) and self.has_update and "update" not in changes:
            raise ValueError(
                "replace(rows=) would change nothing: a transform before this one has set the "
                "direction by an update, which is no weighted sum of rows; put this transform "
                "before that one in wrap(), or change the direction by with_update()"
            )
        if "update" in changes and isinstance(rows, Summed) and rows.total is not None:
            rows = rows.with_total(None, len(self.names))
        elif "layout" in changes:
            rows = self.rows
        kept: dict[str, Any] = {
            "names": self.names,
            "losses": self.losses,
            "rows": rows,
            "weights": self._weights,
            "lr_scale": self._lr_scale,
            "update": self._update,
            "layout": self.layout,
            "observers": self.observers,
            "reached": self.reached,
            "parameter_names": self.parameter_names,
            "seen_gram": None if "rows" in changes else self._seen_gram,
            "bound": None if "update" in changes else self._bound,
        }
        return Gradients(**{**kept, **changes})

    def reweighted(self, factors: Float[Tensor, " K"]) -> Gradients:
        """A copy whose weights are multiplied by these factors; those of observers stay 0."""
        return self.replace(weights=self.weights * factors)

    def with_update(
        self, update: Float[Tensor, " P"] | Storage, *, bound: Float[Tensor, ""] | None = None
    ) -> Gradients:
        """A copy whose direction is `update` instead of the weighted sum of the rows.

        Args:
            update: A flat vector, or a storage of one row, such as another evaluation's `stored()`.
            bound: An upper bound of its norm, if there is one; it saves the check for values that
                are not finite a pass over the vector.
        """
        return self.replace(update=update, bound=bound)

    def with_lr_scale(self, factor: Float[Tensor, ""] | float) -> Gradients:
        """A copy whose `lr_scale` is multiplied by this factor."""
        return self.replace(lr_scale=self.lr_scale * factor)

    def averaged(self, mean: Callable[[Tensor], Tensor]) -> Gradients:
        """A copy with means over the ranks: of rows, direction, weights and `lr_scale`.

        Args:
            mean: The mean of a tensor over the ranks, as a new tensor.
        """
        storage: Storage
        if isinstance(self.storage, Summed):
            storage = self.storage
            if self._total is not None:
                total = Dense(mean(self._total.rows), self.layout)
                storage = self.storage.with_total(total, len(self.names))
            update = None if self._update is None else mean(self.direction())
        else:
            storage = Dense(mean(self.rows), self.layout)
            plain = self._update is None and self._weights is None
            update = None if plain else mean(self.direction())
        return self.replace(
            rows=storage,
            update=update,
            weights=None if self._weights is None else mean(self._weights),
            lr_scale=None if self._lr_scale is None else mean(self._lr_scale),
        )

    def observe(self, *names: str) -> Gradients:
        """A copy in which the named objectives are observers, of weight 0.

        Raises:
            ValueError: If there is no objective of such a name.
        """
        indices = [self.index(name) for name in names]
        weights = self._weights
        if weights is not None:
            weights = _zeroed(weights.clone(), indices)
        return self.replace(weights=weights, observers=self.observers | set(names))

    def __repr__(self) -> str:
        shown = ("names", "losses", "weights", "lr_scale")
        return f"Gradients({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def misfit(self, numel: int) -> str | None:
        """What of these gradients does not fit a flat vector of this length, in words.

        None if everything fits.
        """
        count = len(self.names)
        update: object = self._update
        if isinstance(update, Tensor) and update.shape != (numel,):
            return (
                f"an update of shape {tuple(update.shape)}; give with_update() a flat vector of "
                f"the length of the weights, of shape {(numel,)}"
            )
        if isinstance(update, Tensor) and not update.is_floating_point():
            return f"an update of dtype {update.dtype}; give with_update() a real vector"
        if update is not None and not isinstance(update, (Tensor, Storage)):
            return (
                f"a {type(update).__name__} as its update; give with_update() a flat vector of "
                f"shape {(numel,)}, as context.layout.flatten() makes of one tensor per parameter"
            )
        storage: object = self.storage
        if not isinstance(storage, Storage):
            return (
                f"a {type(storage).__name__} as its rows; give replace(rows=) a matrix of shape "
                f"{(count, numel)}, one flat row for each objective"
            )
        if isinstance(storage, Dense) and storage.rows.shape != (count, numel):
            return (
                f"rows of shape {tuple(storage.rows.shape)}; give replace(rows=) a matrix of "
                f"shape {(count, numel)}, one flat row for each objective"
            )
        if self._weights is not None and self._weights.shape != (count,):
            return (
                f"weights of shape {tuple(self._weights.shape)}; give one for each of its "
                f"{count} objectives ({', '.join(map(repr, self.names))})"
            )
        return None

    def with_parameter_names(self, names: Sequence[str | int]) -> Gradients:
        """A copy with the parameters' names."""
        return self.replace(parameter_names=tuple(names))

    def without_spent_rows(self) -> Gradients:
        """A copy without rows, if the direction is a sum that may take their memory.

        Otherwise the same object. Let go of this one before `settle`, which takes only memory to
        which nothing else refers.
        """
        if isinstance(self._update, LazySum) and self._update.is_made_of(self.storage.parts):
            return self.replace(rows=Spent(self.storage), seen_gram=self._seen_gram)
        return self

    def settle(self) -> None:
        """Compute a direction that is still to be computed, where no rows are needed any more."""
        if isinstance(self._update, LazySum):
            self._update.settle()

    def measured(self) -> Measurement:
        """What is checked for values that are not finite; it keeps no rows."""
        return Measurement(self.names, self.losses, self.gram())

    @property
    def rows(self) -> Float[Tensor, "K P"]:
        """The gradients, one a row; read-only."""
        return self.storage.rows

    @property
    def layout(self) -> Layout | None:
        """Where each parameter lies in the flat vector; None for a bare matrix."""
        return self.storage.layout

    @property
    def known_weights(self) -> list[float] | None:
        """The weights, if the host knows them: all 1, and 0 for observers."""
        if self._weights is not None:
            return None
        return [0.0 if name in self.observers else 1.0 for name in self.names]

    @cached_property
    def weights(self) -> Float[Tensor, " K"]:
        """The objectives' weights; all 1 at first."""
        if self._weights is not None:
            return self._weights
        device = self.storage.device
        ones = torch.ones(len(self.names), dtype=accumulator(device), device=device)
        return _zeroed(ones, [k for k, name in enumerate(self.names) if name in self.observers])

    @cached_property
    def lr_scale(self) -> Float[Tensor, ""]:
        """The factor of the learning rate."""
        if self._lr_scale is not None:
            return self._lr_scale
        device = self.storage.device
        return torch.ones((), dtype=accumulator(device), device=device)

    @property
    def update(self) -> Float[Tensor, " P"] | None:
        """The direction where it is not a weighted sum of the rows, else None.

        It is set by elementwise rules, by rules per group or tensor, and in a step that has
        differentiated the weighted sum of the losses.
        """
        held = self._total if self._update is None else self._update
        return held.rows[0] if isinstance(held, Storage) else held

    @property
    def has_update(self) -> bool:
        """Whether `update` is set; does not make a flat vector."""
        return self._update is not None or self._total is not None

    @property
    def _total(self) -> Storage | None:
        return self.storage.total if isinstance(self.storage, Summed) else None

    @property
    def parts(self) -> Parts | None:
        """The direction as one tensor per parameter, if it was not copied to a flat vector."""
        if self._update is not None:
            return self._update.parts if isinstance(self._update, Storage) else None
        parts = self.storage.parts
        if parts is None or self._total is not None:
            return parts
        return parts if self.known_weights == [1.0] else None

    @property
    def _declared(self) -> list[int]:
        return [k for k, name in enumerate(self.names) if name not in self.observers]

    def row(self, name: str) -> Float[Tensor, " P"] | Parts:
        """An objective's gradient, flat or in parts, as it is stored.

        Raises:
            ValueError: If there is no objective of that name.
        """
        index = self.index(name)
        parts = None if self.has_update else self.storage.parts
        return self.rows[index] if parts is None else parts

    def index(self, name: str) -> int:
        """The row index of the objective `name`.

        Raises:
            ValueError: If there is no objective of that name.
        """
        if name not in self.names:
            raise ValueError(
                f"there is no objective {name!r} here; there are {', '.join(map(repr, self.names))}"
            )
        return self.names.index(name)

    @property
    def active(self) -> tuple[int, ...]:
        """The indices of the rows of nonzero weight.

        The weights are copied from the device, unless they are still 1, and 0 for observers.
        """
        if self._weights is None:
            return tuple(self._declared)
        return tuple(k for k, weight in enumerate(self._weights.tolist()) if weight != 0)

    @property
    def has_unit_weights(self) -> bool:
        """Whether the host knows that all weights are 1, and 0 for observers."""
        return self._weights is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows and direction."""
        return self.rows.dtype if self.layout is None else self.layout.dtype

    @property
    def scales_lr(self) -> bool:
        """Whether a transform has set `lr_scale`."""
        return self._lr_scale is not None

    def gram(self, scope: Scope = "global", *, signs: bool = False) -> Float[Tensor, "*scopes K K"]:
        """The rows' Gram matrix [K, K] in float64; by group or tensor [S, K, K].

        Args:
            scope: "global" for one matrix over all parameters; "group" or "tensor" for one matrix
                per parameter group or tensor; "shared" for one matrix over the parameters in which
                at least two objectives of nonzero weight have a nonzero gradient (0 if there are
                none).
            signs: Whether to replace each element by its sign first.

        Raises:
            ValueError: If the gradients have no layout and `scope` is not "global".
        """
        if scope == "shared":
            shared = self.shared(self.active)
            return (
                self.gram("tensor", signs=True)[list(shared.tensors)].sum(0)
                if signs
                else shared.gram
            )
        return self.storage.gram(scope, signs=signs)

    def segments(self, scope: Scope) -> tuple[tuple[int, int], ...]:
        """The column ranges that `scope` treats separately.

        Raises:
            ValueError: If the gradients have no layout and `scope` is not "global".
        """
        return self.storage.segments(scope)

    def shared(self, rows: Sequence[int]) -> Shared:
        """The parameters that at least two of these rows share.

        A row uses a parameter if its gradient there is not 0. (Compiled and concatenated losses
        have zeros where others' graphs do not reach.) A row that is 0 everywhere uses all
        parameters that its graph reaches. Which gradients are 0 is copied from the device.

        Raises:
            ValueError: If the gradients have no layout.
        """
        segments, grams = self.segments("tensor"), self.gram("tensor")
        nonzero: list[list[bool]] = (grams.diagonal(dim1=-2, dim2=-1) != 0).tolist()
        has_part = {k: [flags[k] for flags in nonzero] for k in rows}
        for k in rows:
            if not any(has_part[k]):
                has_part[k] = [True] * len(segments) if self.reached is None else [*self.reached[k]]
        several = [sum(has_part[k][t] for k in rows) > 1 for t in range(len(segments))]
        spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for (start, stop), flag in zip(segments, several, strict=True):
            ranges = spans[flag]
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        tensors = [t for t, flag in enumerate(several) if flag]
        return Shared(
            tuple(k for k in rows if any(has_part[k][t] for t in tensors)),
            grams[tensors].sum(0),
            tuple(tensors),
            tuple(spans[True]),
            tuple(spans[False]),
        )

    @property
    def seen_gram(self) -> Float[Tensor, "K K"]:
        """The Gram matrix that a rule on shared parameters used; the global one without a rule."""
        return self.gram() if self._seen_gram is None else self._seen_gram

    def cosine(
        self, a: str, b: str, *, scope: Scope = "global", signs: bool = False
    ) -> Float[Tensor, "*blocks"]:
        """The cosine of two objectives' gradients; 0 if one of them is zero.

        Args:
            a: An objective.
            b: Another objective.
            scope: The parameters to use, as for `gram`; "group" and "tensor" give [S] cosines.
            signs: Whether to replace each element by its sign first.

        Raises:
            ValueError: If there is no objective of such a name, or if the gradients have no layout
                and `scope` is not "global".
        """
        return cosines(self.gram(scope, signs=signs))[..., self.index(a), self.index(b)]

    def cosines_by_parameter(self, a: str, b: str) -> dict[str | int, Float[Tensor, ""]]:
        """The cosine of two objectives' gradients in each parameter; 0 where one of them is zero.

        Args:
            a: An objective.
            b: Another objective.

        Returns:
            Cosines by the parameters' names, or by their positions in the flat vector if names are
            not known. `optimizer.gradients` knows the names from `model=`.

        Raises:
            ValueError: If there is no objective of such a name, or if the gradients have no layout.

        Examples:
            >>> import torch, gradkit as gk
            >>> net = torch.nn.Linear(1, 2)
            >>> optimizer = gk.wrap(torch.optim.SGD(net.parameters(), lr=0.1), model=net)
            >>> x = torch.ones(1, 1)
            >>> gradients = optimizer.gradients(
            ...     {"a": lambda: net(x).sum(), "b": lambda: net(x)[0, 0] - 2 * net.bias[0]}
            ... )
            >>> for name, cosine in gradients.cosines_by_parameter("a", "b").items():
            ...     print(name, round(cosine.item(), 4))  # (1, 1)·(1, 0) and (1, 1)·(-1, 0)
            weight 0.7071
            bias -0.7071
        """
        values = self.cosine(a, b, scope="tensor")
        names = range(len(values)) if self.parameter_names is None else self.parameter_names
        return dict(zip(names, values, strict=True))

    def direction(
        self, out: Callable[[], Float[Tensor, " P"]] | None = None
    ) -> Float[Tensor, " P"]:
        """The direction of the step: `update`, or `weights @ rows`.

        The result may share the memory of `rows` or `update`: do not write to it.

        Args:
            out: Allocates memory for the result where it is needed.
        """
        update = self.update
        if update is not None:
            return update
        declared = self._declared
        if len(declared) == 1 and self._weights is None:
            return self.rows[declared[0]]
        result = out() if out is not None else torch.empty_like(self.rows[0])
        if len(declared) == len(self.names) and self._weights is None:
            return torch.sum(self.rows, 0, out=result)  # rounded once, in half precision too
        return combine(self.rows, self.weights, declared, result)

    def stored(self) -> Storage:
        """The direction as it is stored, flat or in parts, without the rows it was made of.

        Its norm is computed once.
        """
        if isinstance(self._update, Storage):
            return self._update
        if self._update is None:
            if self._total is not None:
                return self._total
            if self.parts is not None:
                return self.storage
        direction, known = self.direction(), None
        if self._update is None and self._weights is None and len(self._declared) == 1:
            k = self._declared[0]
            known = self.gram()[k : k + 1, k : k + 1]
        return Dense(direction[None], self.layout, known)

    def direction_bound(self) -> Float[Tensor, ""]:
        """An upper bound of the norm of `direction()`, or the norm itself."""
        return self.direction_norm() if self._bound is None else self._bound

    def direction_norm(self, direction: Float[Tensor, " P"] | None = None) -> Float[Tensor, ""]:
        """The Euclidean norm of `direction()`, which may be passed in if it is already computed."""
        declared = self._declared
        held = self._total if self._update is None else self._update
        if isinstance(held, Storage):
            return held.norm()
        if self._update is None and self._weights is None and len(declared) == 1:
            return self.gram().diagonal()[declared[0]].sqrt()
        # wᵀGw would suffer from cancellation where gradients conflict.
        direction = self.direction() if direction is None else direction
        return norm(direction, over=self.storage.shards)

    def reached_by_direction(
        self, weights: Sequence[float] | None = None
    ) -> tuple[bool, ...] | None:
        """For each of T parameters, whether the graph of a row of nonzero weight reached it.

        Args:
            weights: The weights, if the host has them; otherwise only observers count as weight 0.
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
        return rows[0] if len(rows) == 1 else tuple(map(any, zip(*rows, strict=True)))


def _zeroed(weights: Float[Tensor, " K"], indices: Sequence[int]) -> Float[Tensor, " K"]:
    """Write zeros at these indices; `weights[indices] = 0` would synchronise with the device."""
    for index in indices:
        weights.select(0, index).zero_()
    return weights
