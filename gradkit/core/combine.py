"""Weighted sums of rows, with one rounding at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import at_least_single, block_spans, block_width, exact_products


def combine(
    rows: Float[Tensor, "K P"],
    weights: Float[Tensor, " K"],
    indices: Sequence[int],
    out: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Write the weighted sum of the rows `indices` to `out`.

    The other rows are skipped, not multiplied by 0, since they may be infinite. Rows in half
    precision are weighted and summed in float32, some columns at a time, and the sum is rounded
    once. Weights rounded to half precision could make gradients conflict again.
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
    """Write the weighted sum of ranges of rows to `out`, computed in the dtype of `out`."""
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
    """Write factor · vector to `out`; the factor is not rounded to half precision first."""
    if vector.dtype == at_least_single(vector.dtype):
        return torch.mul(vector, factor.to(vector.dtype), out=out)
    return combine(vector[None], factor[None], (0,), out)
