"""How the gradients of one evaluation are stored: as rows, in parts, or as a sum alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout, Scope
from gradkit.core.gram import accumulator, block_grams, gram, squared_norm
from gradkit.core.ranks import Shards

Parts = Sequence[Tensor | None]
"""A flat vector as one tensor per parameter; None where it is 0."""


class Storage(ABC):
    """Gradients of K objectives, and their inner products, each computed once.

    Attributes:
        layout: Where each parameter lies in the flat vector; None for a bare matrix.
    """

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout
        self._products: dict[tuple[Scope, bool], Tensor] = {}

    @property
    @abstractmethod
    def rows(self) -> Float[Tensor, "K P"]:
        """The gradients, one a row."""

    @property
    def parts(self) -> Parts | None:
        """A single gradient as one tensor per parameter, if it was not copied to a flat vector."""
        return None

    @cached_property
    def vector(self) -> Float[Tensor, " P"] | Parts:
        """The only row, flat or in parts, as it is stored."""
        parts = self.parts
        return self.rows[0] if parts is None else parts

    def norm(self) -> Float[Tensor, ""]:
        """The Euclidean norm of the only row, in float64; computed once."""
        return self.gram("global", signs=False)[0, 0].sqrt()

    @property
    def device(self) -> torch.device:
        """The device of the gradients."""
        return self.rows.device if self.layout is None else self.layout.device

    @property
    def shards(self) -> Shards | None:
        """How the flat vectors are sharded over ranks; None if they are not."""
        return None if self.layout is None else self.layout.shards

    def gram(self, scope: Scope, *, signs: bool) -> Float[Tensor, "*scopes K K"]:
        """The Gram matrix [K, K], or [S, K, K] by group or tensor; computed once.

        Raises:
            ValueError: If there is no layout and `scope` is not "global".
        """
        key = (scope, signs)
        if key not in self._products:
            by_tensor = self._products.get(("tensor", signs))
            if scope != "global":
                segments = self.segments(scope)
                found = block_grams(self.rows, segments, signs=signs, over=self.shards)
            else:
                found = self._gram(signs) if by_tensor is None else by_tensor.sum(0)
            self._products[key] = found
        return self._products[key]

    def _gram(self, signs: bool) -> Float[Tensor, "K K"]:
        return gram(self.rows, signs=signs, over=self.shards)

    def segments(self, scope: Scope) -> tuple[tuple[int, int], ...]:
        """The column ranges that `scope` treats separately.

        Raises:
            ValueError: If there is no layout and `scope` is not "global".
        """
        if self.layout is not None:
            return self.layout.segments(scope)
        if scope == "global":
            return ((0, self.rows.shape[1]),)
        raise ValueError(
            f"scope {scope!r} needs to know where the parameters lie; "
            "a bare matrix has only the scope 'global'"
        )


class Dense(Storage):
    """One flat row per objective."""

    def __init__(
        self,
        rows: Float[Tensor, "K P"],
        layout: Layout | None = None,
        gram: Float[Tensor, "K K"] | None = None,
    ) -> None:
        super().__init__(layout)
        self._rows = rows
        if gram is not None:
            self._products["global", False] = gram

    @property
    def rows(self) -> Float[Tensor, "K P"]:
        return self._rows


class Single(Storage):
    """One objective's gradient as autograd returned it; copied to a row only on demand.

    Args:
        parts: One tensor per parameter, in its dtype, shape and memory format; None for a parameter
            that the graph does not reach.
        layout: Where each parameter lies in the flat vector.
        flatten: Copies the parts to a row.
    """

    def __init__(
        self, parts: Parts, layout: Layout, flatten: Callable[[Parts], Float[Tensor, "1 P"]]
    ) -> None:
        super().__init__(layout)
        self._parts = parts
        self._flatten = flatten

    @cached_property
    def rows(self) -> Float[Tensor, "1 P"]:
        """The gradient as a row."""
        return self._flatten(self._parts)

    @property
    def parts(self) -> Parts:
        return self._parts

    def _gram(self, signs: bool) -> Float[Tensor, "1 1"]:
        if signs or self.device.type not in ("cpu", "cuda"):
            return super()._gram(signs)
        square = squared_norm([part for part in self._parts if part is not None])
        if square is None:
            return super()._gram(signs)
        square = square.reshape(1, 1)
        return square if self.shards is None else self.shards.add_up(square)


class Spent(Storage):
    """Gradients of which only the inner products are left, since their memory may be reused."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.layout)
        storage.gram("global", signs=False)
        self._products.update(storage._products)

    @property
    def rows(self) -> Float[Tensor, "K P"]:
        raise RuntimeError(
            "the gradients have gone into the direction of the step, which may have taken their "
            "memory; read them before the transform that sets it, from inside it in wrap()"
        )


class Summed(Storage):
    """Objectives that are differentiated together, so that no single gradient is ever stored.

    Args:
        layout: Where each parameter lies in the flat vector.
        gram: Computes the gradients' Gram matrix; called at most once, on demand.
        total: The gradient of the weighted sum, once it has been computed.
    """

    def __init__(
        self,
        layout: Layout,
        gram: Callable[[], Float[Tensor, "K K"]],
        total: Storage | None = None,
    ) -> None:
        super().__init__(layout)
        self._make_gram = gram
        self.total = total

    @property
    def rows(self) -> Float[Tensor, "K P"]:
        raise RuntimeError(
            "the objectives' gradients were not taken one by one in this step, so there are no "
            "rows; pass rows='keep' to gk.wrap()"
        )

    @property
    def parts(self) -> Parts | None:
        return None if self.total is None else self.total.parts

    def _gram(self, signs: bool) -> Float[Tensor, "K K"]:
        return super()._gram(signs) if signs else self._make_gram()

    def with_total(self, total: Storage | None, count: int) -> Summed:
        """A copy with the gradient of the weighted sum, which keeps no reference to the graph.

        In the copy the Gram matrix is NaN if it has not been computed before.
        """
        device = self.device

        def unknown() -> Float[Tensor, "K K"]:
            return torch.full((count, count), torch.nan, dtype=accumulator(device), device=device)

        assert self.layout is not None
        made = Summed(self.layout, unknown, total)
        made._products.update(self._products)
        return made
