"""Displacements of the weights, as sums that are computed when an engine needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Union

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout, Pool, are_unshared, copy_parts, is_held_once
from gradkit.core.gram import at_least_single
from gradkit.core.storage import Parts, Storage

# With fewer elements the second pass over memory is in the cache.
_LARGE = 1 << 15


@dataclass(frozen=True, eq=False)
class Displacement:
    """A lazy weighted sum of vectors, by which the weights are displaced.

    Adding it to the weights takes one pass over memory for each term. Wherever the library takes a
    displacement, a flat vector [P] does as well; `context.displaced` makes a displacement of
    either. Sums with flat vectors and products with numbers are displacements; torch's functions
    take it as the flat vector that it stands for.

    Attributes:
        terms: Vectors, flat [P] or one tensor per parameter, and the factor of each.
        layout: Where each parameter lies in the flat vector.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> layout = Layout.of([{"params": [weight]}])
        >>> point = Displacement((), layout).plus(torch.tensor([1.0, 2.0]), -0.5)
        >>> (point + torch.ones(2)).flat()
        tensor([0.5000, 0.0000])
    """

    terms: tuple[tuple[Float[Tensor, " P"] | Parts, Float[Tensor, ""] | float], ...]
    layout: Layout

    @classmethod
    def of(cls, at: Point | None, layout: Layout) -> Displacement:
        """The displacement for a point: itself, a flat vector, or None for no displacement.

        Raises:
            TypeError: If it is something else.
            ValueError: If a flat vector's length differs from that of the weights.
        """
        if isinstance(at, Displacement):
            return at
        if at is None:
            return cls((), layout)
        if not isinstance(at, Tensor):
            raise TypeError(
                f"the displacement at= is a {type(at).__name__}; pass a flat vector of shape "
                f"{(layout.numel,)}"
            )
        if at.shape != (layout.numel,):
            raise ValueError(
                f"the displacement at= has shape {tuple(at.shape)}, but the flat vector of the "
                f"weights has {(layout.numel,)}"
            )
        return cls(((at, 1.0),), layout)

    def plus(
        self, vector: Float[Tensor, " P"] | Parts, factor: Float[Tensor, ""] | float = 1.0
    ) -> Displacement:
        """The displacement plus `factor` times `vector`, which is only read."""
        terms = list(self.terms)
        for number, (known, other) in enumerate(terms):
            if known is vector:  # one pass over memory less
                terms[number] = (vector, other + factor)
                return Displacement(tuple(terms), self.layout)
        return Displacement((*terms, (vector, factor)), self.layout)

    def __add__(self, other: Point) -> Displacement:
        terms = other.terms if isinstance(other, Displacement) else ((other, 1.0),)
        total = self
        for vector, factor in terms:
            total = total.plus(vector, factor)
        return total

    def __mul__(self, number: Float[Tensor, ""] | float) -> Displacement:
        terms = tuple((vector, factor * number) for vector, factor in self.terms)
        return Displacement(terms, self.layout)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Displacement:
        return self * -1.0

    def __sub__(self, other: Point) -> Displacement:
        return self + -other

    def __rsub__(self, other: Point) -> Displacement:
        return -self + other

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """In torch's functions, and in arithmetic with a tensor before it, it is a flat vector."""
        named = {name: _flattened(value) for name, value in (kwargs or {}).items()}
        return function(*_flattened(args), **named)

    def flat(self, out: Float[Tensor, " P"] | None = None) -> Float[Tensor, " P"]:
        """The displacement as a flat vector.

        Args:
            out: Memory for the result, which only the first term may share; None allocates it.
        """
        layout = self.layout
        if out is None:
            out = torch.empty(layout.numel, dtype=layout.dtype, device=layout.device)
        whole = [(v, factor) for v, factor in self._in_order() if isinstance(v, Tensor)]
        if len(whole) == len(self.terms) and out.dtype == at_least_single(out.dtype):
            return _write_sum(whole, out)
        self._write_parts(layout.views(out))
        return out

    def into_a_term(self) -> Parts | None:
        """The displacement in the memory of one of its terms, whose value is then lost.

        It is one of the first two that are added up, given as one tensor per parameter. If
        something else refers to it or to its memory, nothing is written, and None is returned.
        """
        for n in self._order()[:2]:
            if self._is_only_here(n):
                made = list(self.terms[n][0])
                self._write_parts(made)
                return made
        return None

    def _is_only_here(self, n: int) -> bool:
        if isinstance(self.terms[n][0], Tensor) or not is_held_once(self.terms[n], 0):
            return False
        return are_unshared(self.terms[n][0])  # type: ignore[arg-type]  # mypy narrows names only

    def _order(self) -> list[int]:
        """The order in which terms are added up.

        One whose factor is 1 comes first, since it takes no pass over memory of its own.
        """
        ones = [n for n, (_, factor) in enumerate(self.terms) if _Factor(factor).is_one]
        return sorted(range(len(self.terms)), key=lambda n: n not in ones[:1])

    def _in_order(self) -> list[tuple[Float[Tensor, " P"] | Parts, _Factor]]:
        return [(self.terms[n][0], _Factor(self.terms[n][1])) for n in self._order()]

    def _write_parts(self, out: list[Tensor] | list[Tensor | None]) -> None:
        """Write the displacement to `out`, one tensor per parameter; None where there is none."""
        views = [(self._views(vector), factor) for vector, factor in self._in_order()]
        for t, memory in enumerate(out):
            there = [(part[t], factor) for part, factor in views]
            found = [(part, factor) for part, factor in there if part is not None]
            if memory is None and found:
                memory = out[t] = torch.empty_like(found[0][0])
            if memory is not None:
                _write_sum(found, memory)

    def needs_now(self, name: str, vectors: Mapping[str, Tensor]) -> bool:
        """Whether it must be computed before any of these vectors changes, and not in `name`.

        Not so if no term shares memory with one of them, but for the first term with `name` itself.
        """
        held = {each.untyped_storage().data_ptr(): key for key, each in vectors.items()}
        for number, (vector, _) in enumerate(self.terms):
            parts = (vector,) if isinstance(vector, Tensor) else vector
            memory = [part.untyped_storage().data_ptr() for part in parts if part is not None]
            shared = {held[each] for each in memory if each in held}
            if shared - ({name} if number == 0 else set()):
                return True
        return False

    def _views(self, vector: Float[Tensor, " P"] | Parts) -> Parts:
        return self.layout.views(vector) if isinstance(vector, Tensor) else vector

    def add_to(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write weights plus displacement to `out`, one large tensor or some small ones at a time.

        Args:
            weights: One tensor per parameter.
            out: Memory for the results, which may be the weights themselves.
        """
        terms = [(self._views(vector), _Factor(factor)) for vector, factor in self.terms]
        for batch in self.layout.batches:
            if len(batch) > 1 and _add_together(batch, weights, terms, out):
                continue
            for t in batch:
                found = [(vector[t], factor) for vector, factor in terms]
                there = [(part, factor) for part, factor in found if part is not None]
                _add_to_one(weights[t], there, out[t])


def _add_to_one(weight: Tensor, terms: list[tuple[Tensor, _Factor]], out: Tensor) -> None:
    """Write a weight plus tensors times factors to `out`."""
    kinds = {out.dtype, weight.dtype, *(part.dtype for part, _ in terms)}
    if not terms:
        if out is not weight:
            out.copy_(weight)
    elif len(kinds) == 1 and out.dtype == at_least_single(out.dtype):
        for number, (part, factor) in enumerate(terms):
            factor.add(weight if number == 0 else out, part, out)
    else:  # in half precision each factor and each product would be rounded before the sum
        wide = torch.promote_types(out.dtype, torch.float32)
        total = weight.to(wide)
        for part, factor in terms:
            total = total + part.to(wide) * factor.value
        out.copy_(total)


def _add_together(
    batch: Sequence[int],
    weights: Sequence[Tensor],
    terms: list[tuple[Parts, _Factor]],
    out: Sequence[Tensor],
) -> bool:
    """As `_add_to_one` for several weights at once; False, with nothing done, where they differ."""
    own, sums = [weights[t] for t in batch], [out[t] for t in batch]
    found: list[tuple[list[Tensor], _Factor]] = []
    for vector, factor in terms:
        there = [part for part in map(vector.__getitem__, batch) if part is not None]
        if len(there) < len(batch):
            return False
        found.append((there, factor))
    kinds = {each.dtype for each in (*own, *sums, *(part for some, _ in found for part in some))}
    if len(kinds) > 1 or sums[0].dtype != at_least_single(sums[0].dtype):
        return False
    if sums[0] is not own[0]:
        torch._foreach_copy_(sums, own)
    for some, factor in found:
        factor.add_all(some, sums)
    return True


class LazySum(Storage):
    """A direction that is a sum of vectors, computed once it is needed.

    Args:
        total: The sum.
        pool: Memory for it, if no term's can be taken.
    """

    def __init__(self, total: Displacement, pool: Pool) -> None:
        super().__init__(total.layout)
        self._total: Displacement | None = total
        self._pool = pool
        self._parts: Parts | None = None

    @cached_property
    def rows(self) -> Float[Tensor, "1 P"]:
        """The sum as a row."""
        rows, (views,) = self._pool.take(1)
        if self._total is not None:
            self._total.flat(rows[0])
            self._total = None  # and with it the terms
        elif self._parts is not None:
            copy_parts(self._parts, views)
        return rows

    @property
    def parts(self) -> Parts | None:
        return self._parts

    def is_made_of(self, parts: Parts | None) -> bool:
        """Whether this vector is a term of a sum that has not been computed yet."""
        return self._total is not None and any(vector is parts for vector, _ in self._total.terms)

    def settle(self) -> None:
        """Compute the sum where its terms are no longer needed, in the memory of one if possible.

        Where something else refers to a term, it keeps its value.
        """
        if self._total is not None:
            self._parts = self._total.into_a_term()
            self._total = self._total if self._parts is None else None


Point = Union[Float[Tensor, " P"], Displacement]  # noqa: UP007 # a class of jaxtyping's has no "|"
"""The point at which an oracle evaluates: a displacement of the weights, lazy or as a vector."""


def _flattened(value: Any) -> Any:
    """An argument in which displacements are flat vectors, those in sequences, too."""
    if type(value) in (tuple, list):
        return type(value)(map(_flattened, value))
    return value.flat() if isinstance(value, Displacement) else value


def _on_host(value: Float[Tensor, ""] | float) -> Float[Tensor, ""] | float:
    """A number in place of a tensor on the CPU: with it, operations on lists are faster."""
    return float(value) if isinstance(value, Tensor) and value.device.type == "cpu" else value


class _Factor:
    """The factor of a term, cast to each dtype once."""

    def __init__(self, value: Float[Tensor, ""] | float) -> None:
        self.value = _on_host(value)
        self._cast: dict[torch.dtype, Tensor] = {}

    @property
    def is_one(self) -> bool:
        """Whether the host knows that the factor is 1."""
        return isinstance(self.value, (int, float)) and self.value == 1

    def adds_to_one(self, other: _Factor) -> bool:
        """Whether the host knows that the sum with another factor is 1, up to rounding."""
        known = all(isinstance(each.value, (int, float)) for each in (self, other))
        return known and abs(float(self.value + other.value) - 1) < 1e-15

    def add(self, weight: Tensor, part: Tensor, out: Tensor) -> None:
        """Write `weight + value * part` to `out`."""
        if isinstance(self.value, Tensor):
            torch.addcmul(weight, part, self._in(out.dtype), out=out)
        else:
            torch.add(weight, part, alpha=self.value, out=out)

    def add_all(self, parts: list[Tensor], out: list[Tensor]) -> None:
        """Add `value * part` to each of `out`."""
        if isinstance(self.value, Tensor):
            torch._foreach_add_(out, torch._foreach_mul(parts, self._in(out[0].dtype)))
        else:
            torch._foreach_add_(out, parts, alpha=self.value)

    def multiply(self, part: Tensor, out: Tensor) -> None:
        """Write `value * part` to `out`."""
        factor = self._in(out.dtype) if isinstance(self.value, Tensor) else self.value
        torch.mul(part, factor, out=out)

    def _in(self, dtype: torch.dtype) -> Tensor:
        assert isinstance(self.value, Tensor)
        if dtype not in self._cast:
            self._cast[dtype] = self.value.to(dtype)
        return self._cast[dtype]


def _write_sum(terms: list[tuple[Tensor, _Factor]], out: Tensor) -> Tensor:
    """Write the sum of tensors times factors to `out`.

    In half precision it is computed in float32 and rounded once.
    """
    if not terms:
        return out.zero_()
    if out.dtype != at_least_single(out.dtype):
        wide = [part.float() * factor.value for part, factor in terms]
        return out.copy_(sum(wide[1:], start=wide[0]))
    (start, factor), *others = terms
    if not others:
        factor.multiply(start, out)
    for number, (part, other) in enumerate(others):
        if number == 0 and factor.is_one:
            other.add(start, part, out)
            continue
        if number == 0 and factor.adds_to_one(other) and start.dtype == part.dtype == out.dtype:
            torch.lerp(start, part, other.value, out=out)
            continue
        if number == 0 and _write_pair(start, factor, part, other, out):
            continue
        if number == 0 and out.data_ptr() == part.data_ptr():
            other.multiply(part, out)
            factor.add(out, start, out)
            continue
        if number == 0:
            factor.multiply(start, out)
        other.add(out, part, out)
    return out


def _write_pair(a: Tensor, x: _Factor, b: Tensor, y: _Factor, out: Tensor) -> bool:
    """Write `x * a + y * b` to a large `out` in one pass over memory; False if it was not done.

    torch's only function for it is that for outer products, of which one vector is 1 here. It takes
    the factors from the host, so that it is for CPUs, and ignores what it should multiply by 0.
    """
    if out.numel() < _LARGE or out.device.type != "cpu":
        return False
    if out.data_ptr() == a.data_ptr():  # it may write to its first argument only, which is b
        a, x, b, y = b, y, a, x
    alike = all(each.is_contiguous() and each.dtype == out.dtype for each in (a, b, out))
    if not alike or float(y.value) == 0:
        return False
    torch.addr(
        b.view(1, -1),
        out.new_ones(1),
        a.view(-1),
        beta=float(y.value),
        alpha=float(x.value),
        out=out.view(1, -1),
    )
    return True
