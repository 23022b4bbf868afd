"""Vectors in blocks that stay in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout
from gradkit.core.gram import block_spans, block_width
from gradkit.core.storage import Parts


def in_blocks(
    layout: Layout, *vectors: Float[Tensor, " P"] | Parts
) -> Iterator[tuple[Tensor, ...]]:
    """Matching blocks of several vectors, for elementwise operations one after the other.

    A chain of elementwise operations on whole vectors reads and writes memory in each of them, and
    needs memory for what lies between; in blocks it does so once. A single operation gains nothing.

    Args:
        layout: Where each parameter lies in the flat vector.
        vectors: Flat vectors, or one tensor per parameter. Parameters for which one is None are
            left out.

    Yields:
        A block of each vector, all of the same shape; views of the vectors where they are
        contiguous or dense.

    Examples:
        >>> import torch
        >>> layout = Layout.of([{"params": [torch.nn.Parameter(torch.zeros(3))]}])
        >>> out = layout.zeros()
        >>> for a, b in in_blocks(layout, torch.tensor([1.0, 4.0, 9.0]), out):
        ...     torch.sqrt(a, out=b).mul_(2)
        tensor([2., 4., 6.])
    """
    width = block_width(1, layout.device)
    if all(isinstance(vector, Tensor) for vector in vectors):
        pieces: list[tuple[Tensor | None, ...]] = [vectors]  # type: ignore[list-item] # all flat
    else:
        parts = [layout.views(each) if isinstance(each, Tensor) else each for each in vectors]
        pieces = list(zip(*parts, strict=True))
    for piece in pieces:
        there = [part for part in piece if part is not None]
        if len(there) < len(piece):
            continue
        if there[0].numel() <= width or not all(part.is_contiguous() for part in there):
            yield tuple(there)
            continue
        lines = [part.view(-1) for part in there]
        for start, stop in block_spans(0, len(lines[0]), width):
            yield tuple(line[start:stop] for line in lines)


def with_zeros(layout: Layout, vector: Float[Tensor, " P"] | Parts) -> list[Tensor]:
    """A vector in parts, with zeros that take no memory where a part is None.

    Args:
        layout: Where each parameter lies in the flat vector.
        vector: A flat vector, or one tensor per parameter; only read.

    Examples:
        >>> layout = Layout.of([{"params": [torch.nn.Parameter(torch.zeros(3))]}])
        >>> with_zeros(layout, [None])
        [tensor([0., 0., 0.])]
    """
    parts = layout.views(vector) if isinstance(vector, Tensor) else vector
    zero = torch.zeros((), dtype=layout.dtype, device=layout.device)
    shapes = [value.shape for value in layout.local_parameters()]
    return [
        zero.expand(shape) if part is None else part
        for part, shape in zip(parts, shapes, strict=True)
    ]
