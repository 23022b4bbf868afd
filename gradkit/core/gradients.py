"""Gradients of several objectives at one point, and what is to be made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout, Scope
from gradkit.core.gram import (
    accumulator,
    at_least_single,
    block_grams,
    block_spans,
    block_width,
    cosines,
    exact_products,
    gram,
    norm,
    squared_norm,
)
from gradkit.core.ranks import Shards

Parts = Sequence[Tensor | None]
"""A flat vector as one tensor per parameter; None where it is 0."""


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
        parameter_names: What the T parameters are called; None where nobody has said.

    Examples:
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
    # Without a class attribute, so that `__getattr__` can make it.
    update: Float[Tensor, " P"] | None = field(default_factory=lambda: None)
    layout: Layout | None = None
    observers: frozenset[str] = frozenset()
    reached: tuple[tuple[bool, ...], ...] | None = None
    parameter_names: tuple[str | int, ...] | None = None
    # Set by a rule on shared parameters, which has not looked at the others.
    _seen_gram: Tensor | None = field(default=None, repr=False)
    # The tensors as they were made here. While they are still the same ones, unwritten, the host
    # knows what they hold and nothing has to be copied from the device.
    _made_weights: tuple[Tensor, int] | None = field(default=None, repr=False)
    _made_scale: Tensor | None = field(default=None, repr=False)
    _products: dict[tuple[str, bool], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of_parts(
        cls,
        name: str,
        loss: Float[Tensor, ""],
        parts: Parts,
        layout: Layout,
        flatten: Callable[[Parts], Float[Tensor, "1 P"]],
    ) -> Gradients:
        """One objective's gradient as autograd gave it; copied into a row only if asked for.

        Args:
            name: The objective's name.
            loss: Its loss.
            parts: One tensor per parameter, in its dtype, shape and memory format; None for one
                that the graph does not reach.
            layout: Where each parameter lies in the flat vector.
            flatten: Makes `rows` of the parts.
        """
        made = object.__new__(cls)
        dtype = accumulator(layout.device)
        weights = torch.ones(1, dtype=dtype, device=layout.device)
        scale = torch.ones((), dtype=dtype, device=layout.device)
        made.__dict__.update(
            names=(name,),
            losses=loss[None],
            weights=weights,
            lr_scale=scale,
            update=None,
            layout=layout,
            observers=frozenset(),
            reached=(tuple(part is not None for part in parts),),
            _made_weights=(weights, weights._version),
            _made_scale=scale,
            _products={},
            _parts=parts,
            _make_rows=lambda: flatten(parts),
        )
        return made

    @classmethod
    def of_losses(
        cls,
        names: tuple[str, ...],
        losses: Float[Tensor, " K"],
        layout: Layout,
        gram: Callable[[], Float[Tensor, "K K"]],
    ) -> Gradients:
        """Objectives whose losses are known and whose gradients nobody has taken one by one.

        Args:
            names: The objectives' names.
            losses: Their losses.
            layout: Where each parameter lies in the flat vector.
            gram: Finds the gradients' Gram matrix; called at most once, if somebody asks.
        """
        made = cls(names, losses, losses.new_empty(len(names), 0), layout=layout)
        del made.__dict__["rows"]
        made.__dict__.update(_make_rows=_refuse_rows, _make_gram=gram)
        return made

    def taken_together(self, losses: Float[Tensor, " K"], total: Gradients) -> Gradients:
        """What `of_losses` made, once the weighted sum has been differentiated.

        The Gram matrix is NaN if nobody has asked for it before.

        Args:
            losses: The objectives' losses.
            total: The gradient of their weighted sum, as that of a single objective.
        """
        # The function must not hold `self`, whose own one holds the step and its graph.
        count, like = len(self.names), self.weights
        made = self._changed(
            losses=losses,
            reached=None if total.reached is None else total.reached * count,
            _make_gram=lambda: like.new_full((count, count), torch.nan),
            _total=total,
        )
        del made.__dict__["update"]  # until somebody asks for a flat vector
        return made

    def __getattr__(self, name: str) -> Any:
        # Reached for `rows` and `update` only, where nobody has asked to see them yet.
        if name == "rows" and "_make_rows" in self.__dict__:
            self.__dict__["rows"] = self.__dict__["_make_rows"]()
            return self.__dict__["rows"]
        if name == "update" and self._total is not None:
            self.__dict__["update"] = self._total.rows[0]
            return self.__dict__["update"]
        raise AttributeError(name)

    @property
    def _total(self) -> Gradients | None:
        total: Gradients | None = self.__dict__.get("_total")
        return total

    @property
    def has_update(self) -> bool:
        """Whether `update` is set; it may be there in parts only, until somebody reads it."""
        return self._total is not None or self.update is not None

    @property
    def parts(self) -> Parts | None:
        """The direction, one tensor per parameter, where no flat vector was made of it."""
        if self._total is not None:
            return self._total.parts
        parts: Parts | None = self.__dict__.get("_parts")
        return parts

    def row(self, name: str) -> Float[Tensor, " P"] | Parts:
        """An objective's gradient, flat or in parts, whichever is there."""
        index = self.index(name)
        parts = None if self.has_update else self.parts
        return self.rows[index] if parts is None else parts

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
            changes.setdefault("_seen_gram", None)
        elif "_make_gram" in self.__dict__:
            if "update" in changes:
                changes["_total"] = None
            return self._changed(**changes)
        return dataclasses.replace(self, **changes)

    def _changed(self, **changes: Any) -> Gradients:
        """As `replace`, for attributes that need no look at the others."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.__dict__.update(changes)
        return made

    def observe(self, *names: str) -> Gradients:
        """A copy in which the named rows have weight 0."""
        indices = [self.index(name) for name in names]
        known = self.has_unit_weights
        weights = self.weights.clone()
        for index in indices:  # `weights[indices] = 0` would copy both to the device, which waits
            weights.select(0, index).zero_()
        return self.replace(
            weights=weights,
            observers=self.observers | set(names),
            _made_weights=(weights, weights._version) if known else None,
        )

    def without_rows(self) -> Gradients:
        """A copy that knows the rows' Gram matrix but does not keep their memory."""
        products = {("global", False): self.gram()}
        empty = torch.empty(len(self.names), 0, dtype=self.dtype, device=self.weights.device)
        made = self._changed(rows=empty, _products=products)
        made.__dict__.pop("_parts", None)
        made.__dict__.pop("_make_rows", None)
        return made

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
        if self.has_unit_weights:
            return tuple(k for k, name in enumerate(self.names) if name not in self.observers)
        return tuple(k for k, weight in enumerate(self.weights.tolist()) if weight != 0)

    @property
    def has_unit_weights(self) -> bool:
        """Whether all weights are known to be 1, but for observers', without reading them."""
        made = self._made_weights
        return made is not None and made[0] is self.weights and made[1] == self.weights._version

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows and direction."""
        return self.rows.dtype if self.layout is None else self.layout.dtype

    @property
    def scales_lr(self) -> bool:
        """Whether a transform has set `lr_scale`."""
        return self._made_scale is not self.lr_scale or self.lr_scale._version != 0

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
        key = (scope, signs)
        if key not in self._products:
            by_tensor = self._products.get(("tensor", signs))
            if "_make_gram" in self.__dict__ and key == ("global", False):
                self._products[key] = self.__dict__["_make_gram"]()
            elif scope == "global" and by_tensor is not None:
                self._products[key] = by_tensor.sum(0)
            elif scope == "global":
                square = self._squared_norm(signs=signs)
                self._products[key] = (
                    square
                    if square is not None
                    else gram(self.rows, signs=signs, over=self._shards)
                )
            else:
                segments = self.segments(scope)
                self._products[key] = block_grams(
                    self.rows, segments, signs=signs, over=self._shards
                )
        return self._products[key]

    def _squared_norm(self, *, signs: bool) -> Float[Tensor, "1 1"] | None:
        """The Gram matrix of a single gradient in parts, if it can be had without a row."""
        parts, layout = self.parts, self.layout
        if parts is None or layout is None or signs or layout.device.type not in ("cpu", "cuda"):
            return None
        square = squared_norm([part for part in parts if part is not None])
        if square is None:
            return None
        square = square.reshape(1, 1)
        return square if layout.shards is None else layout.shards.add_up(square)

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

    def with_parameter_names(self, names: Sequence[str | int]) -> Gradients:
        """A copy that knows what the parameters are called."""
        return self._changed(parameter_names=tuple(names))

    def direction(
        self, out: Callable[[], Float[Tensor, " P"]] | None = None
    ) -> Float[Tensor, " P"]:
        """The direction of the step: `update`, or `weights @ rows`.

        The result may share the memory of `rows` or `update`: read it, do not write to it.

        Args:
            out: Returns memory for the result where some is needed.
        """
        if self.has_update:
            return cast(Tensor, self.update)
        declared = [k for k, name in enumerate(self.names) if name not in self.observers]
        if len(declared) == 1 and self.has_unit_weights:
            return self.rows[declared[0]]
        result = out() if out is not None else torch.empty_like(self.rows[0])
        return combine(self.rows, self.weights, declared, result)

    def direction_norm(self, direction: Float[Tensor, " P"] | None = None) -> Float[Tensor, ""]:
        """The Euclidean norm of `direction()`, which may be passed in if it is there already."""
        if self._total is not None:
            return self._total.direction_norm()
        declared = [name for name in self.names if name not in self.observers]
        if self.update is None and len(declared) == 1 and self.has_unit_weights:
            return self.gram()[self.index(declared[0]), self.index(declared[0])].sqrt()
        # wᵀGw would cancel where gradients conflict.
        return norm(self.direction() if direction is None else direction, over=self._shards)

    @property
    def _shards(self) -> Shards | None:
        return None if self.layout is None else self.layout.shards

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


def _refuse_rows() -> Float[Tensor, "K P"]:
    raise RuntimeError(
        "the objectives' gradients were not taken one by one in this step, so there are no rows; "
        "pass rows='keep' to gk.wrap()"
    )


def combine(
    rows: Float[Tensor, "K P"],
    weights: Float[Tensor, " K"],
    indices: Sequence[int],
    out: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Write the weighted sum of the rows `indices` to `out`.

    The other rows are left out rather than multiplied by 0: theirs may be infinite. Rows in half
    precision are weighted and added up in float32, some columns at a time, and the sum is rounded
    once: weights in half precision would be other weights, which let gradients conflict again.
    """
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    if not runs:
        return out.zero_()
    with exact_products(out.device):
        if rows.dtype == at_least_single(rows.dtype):
            return _add_up(rows, weights.to(rows.dtype), runs, out)
        weights = weights.float()
        for first, last in block_spans(0, len(out), block_width(len(indices), out.device)):
            columns, part = rows[:, first:last], out[first:last]
            part.copy_(_add_up(columns, weights, runs, torch.empty_like(part, dtype=torch.float32)))
    return out


def _add_up(
    rows: Float[Tensor, "K n"],
    weights: Float[Tensor, " K"],
    runs: Sequence[tuple[int, int]],
    out: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Write the weighted sum of ranges of rows to `out`, in its dtype."""
    for position, (start, stop) in enumerate(runs):
        matrix = rows[start:stop].to(out.dtype).T
        if position == 0:
            torch.mv(matrix, weights[start:stop], out=out)
        else:
            torch.addmv(out, matrix, weights[start:stop], out=out)
    return out


def scaled(
    vector: Float[Tensor, " P"], factor: Float[Tensor, ""], out: Float[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """Write a vector's multiple to `out`; the factor is not rounded to half precision first."""
    if vector.dtype == at_least_single(vector.dtype):
        return torch.mul(vector, factor.to(vector.dtype), out=out)
    return combine(vector[None], factor[None], (0,), out)
