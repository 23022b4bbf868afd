"""The base class for elementwise rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.gram import at_least_single, block_spans, block_width
from gradkit.core.noise import noise_by_parameter
from gradkit.core.oracle import Oracle
from gradkit.core.ranks import Shards
from gradkit.surgery.rule import Rule, checked_jacobian
from gradkit.surgery.weighing import active_rows


@dataclass(frozen=True, eq=False)
class Blocks:
    """The gradients that a rule works on, in blocks of columns; can be iterated repeatedly.

    Attributes:
        names: The objectives' names; the row numbers for a bare matrix.
        device: The device of the gradients.
        spans: The column range of each block, half open.
        cut: The function that makes a block from its range.
    """

    names: tuple[str, ...]
    device: torch.device
    spans: Sequence[tuple[int, int]]
    cut: Callable[[int, int], Float[Tensor, "K n"]]

    def __iter__(self) -> Iterator[Float[Tensor, "K n"]]:
        for start, stop in self.spans:
            yield self.cut(start, stop)


class ElementwiseRule(Rule):
    """Base class for rules that work elementwise.

    A rule computes each component of the direction from the same component of every gradient. In
    `wrap` the result is not a weighted sum of whole gradients, so no other rule can follow. Where
    parameters are sharded, each rank works on its own shards. Gradients in half precision are
    merged in float32, and the direction is rounded once.

    Cost: a few passes over the gradients. Memory: one flat vector, the direction.
    """

    sets_update = True
    noise: ClassVar[Literal["uniform", "normal"] | None] = None
    """The distribution of the rule's random numbers, one per component; None without noise."""

    @abstractmethod
    def merge(
        self, rows: Float[Tensor, "K n"], noise: Float[Tensor, " n"] | None, prepared: Any
    ) -> Float[Tensor, " n"]:
        """The direction in some columns of the gradients.

        Args:
            rows: These columns, in float32 if the gradients are narrower; read-only.
            noise: One random number per column, in float32; None if the rule has no `noise`.
            prepared: The result of `prepare`.
        """

    def prepare(self, blocks: Blocks, over: Shards | None) -> Any:
        """Values computed from all columns, or from the objectives, before any column is merged.

        Args:
            blocks: The gradients in blocks of columns, and the objectives' names.
            over: The ranks that hold other columns; None if there are none.
        """
        return None

    def __call__(self, jacobian: Float[Tensor, "K P"]) -> Float[Tensor, " P"]:
        jacobian = checked_jacobian(jacobian)
        direction = torch.empty_like(jacobian[0])
        layout = Layout.of([{"params": [direction.clone().requires_grad_()]}])
        names = tuple(map(str, range(len(jacobian))))
        state = None if self.generator is None else self.generator.get_state()
        try:
            self._merge_all(jacobian, names, None, None, self._draw(), layout, direction)
        finally:
            if state is not None and self.generator is not None and self._owner() is not None:
                self.generator.set_state(state)
        return direction

    def around(self, inner: Oracle, context: Context) -> Oracle:
        # Drawn once per step, at the first evaluation.
        drawn: list[int | None] = []

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            gradients = inner(at, only)
            active = active_rows(self, gradients)
            if not active:
                return gradients
            chosen = None if len(active) == len(gradients.names) else list(active)
            weights = None if gradients.has_unit_weights else gradients.weights[list(active)]
            names = tuple(gradients.names[k] for k in active)
            update = context.pool.take_vector()
            if not drawn:
                drawn.append(self._draw())
            self._merge_all(
                gradients.rows, names, chosen, weights, drawn[0], context.layout, update
            )
            return gradients.replace(update=update)

        return oracle

    def _draw(self) -> int | None:
        """The seed of one step's random numbers."""
        if self.noise is None:
            return None
        return int(torch.randint(2**62, (), generator=self.generator, device="cpu"))

    def _merge_all(
        self,
        rows: Float[Tensor, "N P"],
        names: tuple[str, ...],
        chosen: list[int] | None,
        weights: Float[Tensor, " K"] | None,
        seed: int | None,
        layout: Layout,
        out: Float[Tensor, " P"],
    ) -> None:
        dtype = at_least_single(rows.dtype)

        def block(start: int, stop: int) -> Float[Tensor, "K n"]:
            columns = rows[:, start:stop] if chosen is None else rows[chosen, start:stop]
            columns = columns.to(dtype)
            return columns if weights is None else columns * weights[:, None].to(dtype)

        width = block_width(len(names), layout.device)
        spans = block_spans(0, layout.numel, width)
        prepared = self.prepare(Blocks(names, layout.device, spans, block), layout.shards)
        if seed is None or self.noise is None:
            for start, stop in spans:
                out[start:stop] = self.merge(block(start, stop), None, prepared)
            return
        draw = noise_by_parameter(self.noise, seed, layout)
        for t, (first, last) in enumerate(layout.segments("tensor")):
            noise = draw(t)
            for start, stop in block_spans(first, last, width):
                part = noise[start - first : stop - first]
                out[start:stop] = self.merge(block(start, stop), part, prepared)
