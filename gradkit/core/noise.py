"""Random numbers that do not depend on sharding or memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.flat import Layout
from gradkit.core.ranks import part_of


def noise_by_parameter(
    kind: Literal["uniform", "normal"], seed: int, layout: Layout
) -> Callable[..., Float[Tensor, " n"]]:
    """A function from a parameter's position to its random numbers, as a flat vector.

    The numbers do not depend on sharding or memory layout. The function may be given memory for
    them as `out`.
    """
    generator = torch.Generator(layout.device).manual_seed(seed)
    draw = torch.rand if kind == "uniform" else torch.randn

    def numbers(t: int, out: Tensor | None = None) -> Float[Tensor, " n"]:
        parameter = layout.parameters[t]
        plain = layout.shards is None and layout.strides[t] is None
        if out is not None and plain and out.dtype == torch.float32:
            draw(
                parameter.shape,
                generator=generator,
                out=out.view(parameter.shape),
                device=layout.device,
                dtype=torch.float32,
            )
            return out
        found = elsewhere(t)
        return found if out is None else out.copy_(found)

    def elsewhere(t: int) -> Float[Tensor, " n"]:
        parameter = layout.parameters[t]
        whole = draw(
            parameter.shape, generator=generator, device=layout.device, dtype=torch.float32
        )
        local = part_of(whole, parameter)
        strides = layout.strides[t]
        if strides is None:
            return local.reshape(-1)
        laid_out = torch.empty_strided(
            local.shape, strides, device=layout.device, dtype=torch.float32
        )
        laid_out.copy_(local)
        return laid_out.as_strided((local.numel(),), (1,))

    return numbers
