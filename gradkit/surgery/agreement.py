"""Elementwise sums where the signs of all gradients agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator
from gradkit.core.ranks import Shards
from gradkit.surgery.elementwise import Blocks, ElementwiseRule
from gradkit.surgery.rule import own_generator


@dataclass(eq=False)
class AgrSum(ElementwiseRule):
    """Sum the components whose signs agree (Mansilla et al., ICCV 2021).

    Agr-Sum of [Domain Generalization via Gradient Surgery](https://arxiv.org/abs/2108.01621),
    for each parameter p:

        if sign(g_1p) = … = sign(g_Kp):   d_p = Σ_i g_ip
        else:                             d_p = 0

    A gradient of 0 agrees with no other sign, as in the authors' code.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.AgrSum()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0., 2., 2.])
    """

    def merge(
        self, rows: Float[Tensor, "K n"], noise: Float[Tensor, " n"] | None, prepared: Any
    ) -> Float[Tensor, " n"]:
        return rows.sum(0).mul_(_agreement(rows.amin(0), rows.amax(0)))


@dataclass(eq=False)
class AgrRand(ElementwiseRule):
    """Sum the components whose signs agree, draw the others (Mansilla et al., ICCV 2021).

    Agr-Rand of [Domain Generalization via Gradient Surgery](https://arxiv.org/abs/2108.01621),
    for each parameter p:

        if sign(g_1p) = … = sign(g_Kp):   d_p = Σ_i g_ip
        else:                             d_p ~ N(0, s²)

    with s the mean of |d_p| over all the parameters that agree, and 0 if none do. Without noise,
    the other weights might never move. s is defined as in the authors' code, with two differences:
    their code also draws parameters whose gradients are all 0, which stay 0 here, and its s is NaN
    if no parameter agrees.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: the generator.

    Args:
        generator: A CPU generator; by default a new one with seed 0, the same in every process.

    Raises:
        TypeError: If `generator` is not a generator.
        ValueError: If it is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> d = gk.AgrRand()(torch.tensor([[-4.0, 1.0, 1.0, 0.0], [6.0, 1.0, 1.0, 0.0]]))
        >>> d[1:], d[0].item() not in (2.0, 0.0)
        (tensor([2., 2., 0.]), True)
    """

    noise = "normal"
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.generator = own_generator(self.generator)

    def prepare(self, blocks: Blocks, over: Shards | None) -> Float[Tensor, ""]:
        sizes, counts = [], []
        for rows in blocks:
            wide = accumulator(rows.device)
            agreement = _agreement(rows.amin(0), rows.amax(0))
            counts.append(agreement.sum(dtype=wide))
            sizes.append(agreement.mul_(rows.sum(0)).abs_().sum(dtype=wide))
        sums = torch.zeros(2, dtype=accumulator(blocks.device), device=blocks.device)
        if sizes:  # a rank may hold no elements
            sums += torch.stack([torch.stack(sizes).sum(), torch.stack(counts).sum()])
        if over is not None:
            over.add_up(sums)
        return sums[0] / sums[1].clamp(min=1)

    def merge(
        self,
        rows: Float[Tensor, "K n"],
        noise: Float[Tensor, " n"] | None,
        prepared: Float[Tensor, ""],
    ) -> Float[Tensor, " n"]:
        assert noise is not None  # the rule asks for some
        low, high = rows.amin(0), rows.amax(0)
        agreement = _agreement(low, high)
        # 0 where all gradients are equal: there they agree, or are all 0.
        differs = (high - low).sign_()
        drawn = differs.mul_(1 - agreement).mul_(noise).mul_(prepared)
        return drawn.add_(agreement.mul_(rows.sum(0)))


def _agreement(low: Float[Tensor, " n"], high: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 where the least and the largest element of each column have the same sign, else 0.

    Floating-point masks: on a CPU, products take a fifth of the time of `torch.where`, and they
    propagate values that are not finite.
    """
    return low.clamp(min=0).sub_(high.clamp(max=0)).sign_()
