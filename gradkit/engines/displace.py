"""Weights plus displacement, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout
from gradkit.core.oracle import Along

HALF = (torch.float16, torch.bfloat16)


def write_sums(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    at: Float[Tensor, " P"] | Along,
    layout: Layout,
) -> None:
    """Write `weights + at`, tensor by tensor, to `out`, which may be the weights themselves."""
    if not isinstance(at, Along):
        for value, weight, part in zip(out, weights, layout.views(at), strict=True):
            torch.add(weight, part, out=value)
        return
    factors: dict[torch.dtype, Tensor] = {}
    if isinstance(at.factor, Tensor):  # cast once, not for each parameter
        factors = {dtype: at.factor.to(dtype) for dtype in set(layout.dtypes)}
    for value, weight, along in zip(out, weights, at.parts(layout), strict=True):
        if along is None:
            value.copy_(weight)
        elif value.dtype == weight.dtype == along.dtype and value.dtype not in HALF:
            if isinstance(at.factor, float):
                torch.add(weight, along, alpha=at.factor, out=value)
            else:
                torch.addcmul(weight, along, factors[value.dtype], out=value)
        else:  # half precision would round the factor, and the product, before the sum
            wide = torch.promote_types(value.dtype, torch.float32)
            value.copy_(weight.to(wide) + along.to(wide) * at.factor)
