"""Gradients of several objectives at one point, and what is to be made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import combine
from gradkit.core.flat import Layout, Scope
from gradkit.core.gram import accumulator, cosines, norm
from gradkit.core.storage import Dense, Parts, Storage, Summed


class Shared(NamedTuple):
    """What objectives have in common.

    Attributes:
        rows: Those that have part in it.
        gram: The Gram matrix [K, K] over it, of all rows.
        tensors: The numbers of the parameters that belong to it.
        spans: The column ranges that it takes; neighbours make one.
        others: The other column ranges.
    """

    rows: tuple[int, ...]
    gram: Float[Tensor, "K K"]
    tensors: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Gradients:
    """Gradients of K objectives at one point, and what is to be made of them.

    The step is `lr_scale` times the base optimizer's, on `direction()`: `weights @ rows`, or
    `update` where a transform has set it. A row of weight 0 is an observer: it serves cosines
    and gates and takes no part in the direction.

    A value that does not change: `reweighted`, `with_update`, `with_lr_scale`, `observe` and
    `replace` return changed copies. Do not write to its tensors.

    Attributes:
        names: The objectives' names.
        losses: Their losses [K], detached.
        storage: How their gradients are stored.
        observers: Names whose weight is 0 by declaration; see `observe`.
        reached: K × T flags, which parameters each objective's graph reached; None: all.
        parameter_names: What the T parameters are called; None where nobody has said.

    Args:
        names: The objectives' names.
        losses: Their losses.
        rows: Their gradients [K, P], or how they are stored.
        weights: One weight each; None for 1, and 0 for observers.
        lr_scale: What the learning rate is multiplied by; None for 1.
        update: The direction where it is no weighted sum of the rows.
        layout: Where each parameter lies in the flat vector; needed with rows, for scopes only.
        observers: Names whose weight is 0.
        reached: Which parameters each objective's graph reached.
        parameter_names: What the parameters are called.
        seen_gram: The Gram matrix that a rule on shared parameters has seen.

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
    # None where the host knows them: 1, and 0 for observers.
    _weights: Float[Tensor, " K"] | None
    _lr_scale: Float[Tensor, ""] | None
    _update: Float[Tensor, " P"] | None
    # Of a rule on shared parameters, which has not looked at the others.
    _seen_gram: Float[Tensor, "K K"] | None

    def __init__(
        self,
        names: tuple[str, ...],
        losses: Float[Tensor, " K"],
        rows: Float[Tensor, "K P"] | Storage,
        weights: Float[Tensor, " K"] | None = None,
        lr_scale: Float[Tensor, ""] | None = None,
        update: Float[Tensor, " P"] | None = None,
        layout: Layout | None = None,
        observers: frozenset[str] = frozenset(),
        reached: tuple[tuple[bool, ...], ...] | None = None,
        parameter_names: tuple[str | int, ...] | None = None,
        seen_gram: Float[Tensor, "K K"] | None = None,
    ) -> None:
        given = {
            "names": names,
            "losses": losses,
            "storage": Dense(rows, layout) if isinstance(rows, Tensor) else rows,
            "observers": observers,
            "reached": reached,
            "parameter_names": parameter_names,
            "_weights": weights,
            "_lr_scale": lr_scale,
            "_update": update,
            "_seen_gram": seen_gram,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Gradients:
        """A copy with some of the constructor's arguments changed.

        Inner products are kept unless `rows` changes.
        """
        storage = self.storage
        if "update" in changes and isinstance(storage, Summed):
            storage = storage.with_total(None, len(self.names))
        kept: dict[str, Any] = {
            "names": self.names,
            "losses": self.losses,
            "rows": storage,
            "weights": self._weights,
            "lr_scale": self._lr_scale,
            "update": self._update,
            "layout": self.layout,
            "observers": self.observers,
            "reached": self.reached,
            "parameter_names": self.parameter_names,
            "seen_gram": None if "rows" in changes else self._seen_gram,
        }
        return Gradients(**{**kept, **changes})

    def reweighted(self, factors: Float[Tensor, " K"]) -> Gradients:
        """A copy whose weights are multiplied by these factors."""
        return self.replace(weights=self.weights * factors)

    def with_update(self, update: Float[Tensor, " P"]) -> Gradients:
        """A copy whose direction is `update`, whatever rows and weights are."""
        return self.replace(update=update)

    def with_lr_scale(self, factor: Float[Tensor, ""] | float) -> Gradients:
        """A copy whose learning rate is multiplied by this factor, too."""
        return self.replace(lr_scale=self.lr_scale * factor)

    def observe(self, *names: str) -> Gradients:
        """A copy in which the named rows have weight 0."""
        indices = [self.index(name) for name in names]
        weights = self._weights
        if weights is not None:
            weights = _zeroed(weights.clone(), indices)
        return self.replace(weights=weights, observers=self.observers | set(names))

    def with_parameter_names(self, names: Sequence[str | int]) -> Gradients:
        """A copy that knows what the parameters are called."""
        return self.replace(parameter_names=tuple(names))

    def without_rows(self) -> Gradients:
        """A copy that knows the rows' Gram matrix but does not keep their memory."""
        empty = torch.empty(len(self.names), 0, dtype=self.dtype, device=self.storage.device)
        return self.replace(rows=Dense(empty, self.layout, self.gram()))

    @property
    def rows(self) -> Float[Tensor, "K P"]:
        """Their gradients; only to be read."""
        return self.storage.rows

    @property
    def layout(self) -> Layout | None:
        """Where each parameter lies in the flat vector; None for a bare matrix."""
        return self.storage.layout

    @property
    def weights(self) -> Float[Tensor, " K"]:
        """One weight each; all 1 at first."""
        if self._weights is not None:
            return self._weights
        device = self.storage.device
        ones = torch.ones(len(self.names), dtype=accumulator(device), device=device)
        return _zeroed(ones, [k for k, name in enumerate(self.names) if name in self.observers])

    @property
    def lr_scale(self) -> Float[Tensor, ""]:
        """What the learning rate is multiplied by."""
        if self._lr_scale is not None:
            return self._lr_scale
        device = self.storage.device
        return torch.ones((), dtype=accumulator(device), device=device)

    @property
    def update(self) -> Float[Tensor, " P"] | None:
        """The direction where it is no weighted sum of the rows, else None.

        So it is after elementwise rules, rules by parameter tensor, and in a step that has
        differentiated the weighted sum of the losses.
        """
        if self._update is None and self._total is not None:
            return self._total.rows[0]
        return self._update

    @property
    def has_update(self) -> bool:
        """Whether `update` is set, without making a flat vector of it."""
        return self._update is not None or self._total is not None

    @property
    def _total(self) -> Storage | None:
        return self.storage.total if isinstance(self.storage, Summed) else None

    @property
    def parts(self) -> Parts | None:
        """The direction, one tensor per parameter, where no flat vector was made of it."""
        if self._update is not None:
            return None
        is_direction = self._total is not None or (self._weights is None and self._declared == [0])
        return self.storage.parts if is_direction else None

    @property
    def _declared(self) -> list[int]:
        return [k for k, name in enumerate(self.names) if name not in self.observers]

    def row(self, name: str) -> Float[Tensor, " P"] | Parts:
        """An objective's gradient, flat or in parts, whichever is there."""
        index = self.index(name)
        parts = None if self.has_update else self.storage.parts
        return self.rows[index] if parts is None else parts

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
        if self._weights is None:
            return tuple(self._declared)
        return tuple(k for k, weight in enumerate(self._weights.tolist()) if weight != 0)

    @property
    def has_unit_weights(self) -> bool:
        """Whether all weights are known to be 1, but for observers', without reading them."""
        return self._weights is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows and direction."""
        return self.rows.dtype if self.layout is None else self.layout.dtype

    @property
    def scales_lr(self) -> bool:
        """Whether a transform has set `lr_scale`."""
        return self._lr_scale is not None

    def gram(self, scope: Scope = "global", *, signs: bool = False) -> Float[Tensor, ...]:
        """The rows' Gram matrix [K, K] in float64; by group or tensor [S, K, K], one a block.

        Args:
            scope: "global"; "group" or "tensor" for one matrix per parameter group or tensor; or
                "shared" for a single one, over the parameters in which at least two objectives of
                nonzero weight have a gradient that is not 0 (0 if there are none).
            signs: Whether to take each number's sign first.

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
        """The column ranges that `scope` treats one by one.

        Raises:
            ValueError: If the gradients have no layout and `scope` is not "global".
        """
        return self.storage.segments(scope)

    def shared(self, rows: Sequence[int]) -> Shared:
        """What at least two of these rows have in common, parameter by parameter.

        A row has part in a parameter if its gradient is not 0 there. (Compiled and concatenated
        losses have zeros where others' graphs do not reach.) One that is 0 everywhere has part in
        all that its graph reaches. Reads from the device which gradients are 0.

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
        """The Gram matrix that a rule on shared parameters saw; without one, the global one."""
        return self.gram() if self._seen_gram is None else self._seen_gram

    def cosine(
        self, a: str, b: str, *, scope: Scope = "global", signs: bool = False
    ) -> Float[Tensor, "*blocks"]:
        """The cosine of two objectives' gradients; 0 if one of them is zero.

        Args:
            a: An objective.
            b: Another one.
            scope: What it is taken over, as for `gram`; "group" and "tensor" give one a block, [S].
            signs: Whether to take each number's sign first.
        """
        return cosines(self.gram(scope, signs=signs))[..., self.index(a), self.index(b)]

    def cosines_by_parameter(self, a: str, b: str) -> dict[str | int, Float[Tensor, ""]]:
        """The cosine of two objectives' gradients in each parameter; 0 where one has none.

        Args:
            a: An objective.
            b: Another one.

        Returns:
            Cosines by the parameters' names; by their positions in the flat vector where nobody
            has said what they are called. `optimizer.gradients` knows the names from `model=`.

        Raises:
            ValueError: If the gradients have no layout.

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

        The result may share the memory of `rows` or `update`: read it, do not write to it.

        Args:
            out: Returns memory for the result where some is needed.
        """
        update = self.update
        if update is not None:
            return update
        declared = self._declared
        if len(declared) == 1 and self._weights is None:
            return self.rows[declared[0]]
        result = out() if out is not None else torch.empty_like(self.rows[0])
        return combine(self.rows, self.weights, declared, result)

    def direction_norm(self, direction: Float[Tensor, " P"] | None = None) -> Float[Tensor, ""]:
        """The Euclidean norm of `direction()`, which may be passed in if it is there already."""
        declared = self._declared
        if self._update is None and self._total is not None:
            return self._total.gram("global", signs=False)[0, 0].sqrt()
        if self._update is None and self._weights is None and len(declared) == 1:
            return self.gram().diagonal()[declared[0]].sqrt()
        # wᵀGw would cancel where gradients conflict.
        direction = self.direction() if direction is None else direction
        return norm(direction, over=self.storage.shards)

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


def _zeroed(weights: Float[Tensor, " K"], indices: Sequence[int]) -> Float[Tensor, " K"]:
    """Write zeros; `weights[indices] = 0` would copy both to the device, which waits."""
    for index in indices:
        weights.select(0, index).zero_()
    return weights
