"""Displacements of the weights, as sums that are computed when an engine needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import scaled
from gradkit.core.flat import Layout
from gradkit.core.gram import at_least_single
from gradkit.core.storage import Parts


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
            ValueError: If a flat vector's length differs from that of the weights.
        """
        if isinstance(at, Displacement):
            return at
        if at is None:
            return cls((), layout)
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
        return Displacement((*self.terms, (vector, factor)), self.layout)

    def __add__(self, other: Point) -> Displacement:
        terms = other.terms if isinstance(other, Displacement) else ((other, 1.0),)
        return Displacement((*self.terms, *terms), self.layout)

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
            out: Memory for the result, which no term may share; None allocates it.
        """
        layout = self.layout
        if out is None:
            out = torch.empty(layout.numel, dtype=layout.dtype, device=layout.device)
        if not self.terms:
            return out.zero_()
        for number, (vector, factor) in enumerate(self.terms):
            if isinstance(vector, Tensor):
                if number == 0 and isinstance(factor, Tensor):
                    scaled(vector, factor, out)
                elif number == 0:
                    torch.mul(vector, factor, out=out)
                elif not isinstance(factor, Tensor):
                    out.add_(vector, alpha=factor)
                elif out.dtype == at_least_single(out.dtype):
                    torch.addcmul(out, vector, factor.to(out.dtype), out=out)
                else:
                    out.add_(vector * factor)
                continue
            for view, part in zip(layout.views(out), vector, strict=True):
                if part is None:
                    if number == 0:
                        view.zero_()
                elif number == 0:
                    torch.mul(part, factor, out=view)
                else:
                    view.add_(part * factor)
        return out

    def add_to(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write weights plus displacement to `out`, one tensor at a time.

        Args:
            weights: One tensor per parameter.
            out: Memory for the results, which may be the weights themselves.
        """
        terms = [
            (self.layout.views(vector) if isinstance(vector, Tensor) else vector, _Factor(factor))
            for vector, factor in self.terms
        ]
        for t, (value, weight) in enumerate(zip(out, weights, strict=True)):
            found = [(vector[t], factor) for vector, factor in terms]
            there = [(part, factor) for part, factor in found if part is not None]
            kinds = {value.dtype, weight.dtype, *(part.dtype for part, _ in there)}
            if not there:
                if value is not weight:
                    value.copy_(weight)
            elif len(kinds) == 1 and value.dtype == at_least_single(value.dtype):
                for number, (part, factor) in enumerate(there):
                    factor.add(weight if number == 0 else value, part, value)
            else:  # in half precision each factor and each product would be rounded before the sum
                wide = torch.promote_types(value.dtype, torch.float32)
                total = weight.to(wide)
                for part, factor in there:
                    total = total + part.to(wide) * factor.value
                value.copy_(total)


Point = Union[Float[Tensor, " P"], Displacement]  # noqa: UP007 # a class of jaxtyping's has no "|"
"""The point at which an oracle evaluates: a displacement of the weights, lazy or as a vector."""


def _flattened(value: Any) -> Any:
    """An argument in which displacements are flat vectors, those in sequences, too."""
    if type(value) in (tuple, list):
        return type(value)(map(_flattened, value))
    return value.flat() if isinstance(value, Displacement) else value


class _Factor:
    """The factor of a term, cast to each dtype once."""

    def __init__(self, value: Float[Tensor, ""] | float) -> None:
        self.value = value
        self._cast: dict[torch.dtype, Tensor] = {}

    def add(self, weight: Tensor, part: Tensor, out: Tensor) -> None:
        """Write `weight + value * part` to `out`."""
        if not isinstance(self.value, Tensor):
            torch.add(weight, part, alpha=self.value, out=out)
            return
        if out.dtype not in self._cast:
            self._cast[out.dtype] = self.value.to(out.dtype)
        torch.addcmul(weight, part, self._cast[out.dtype], out=out)
