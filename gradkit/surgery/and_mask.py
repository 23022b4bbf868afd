"""The mean gradient, masked by how far the signs of the gradients agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.elementwise import ElementwiseRule


@dataclass(eq=False)
class ANDMask(ElementwiseRule):
    """The mean where signs agree ([Parascandolo et al., 2021](https://arxiv.org/abs/2009.00329)).

    From Learning Explanations that Are Hard to Vary, for each parameter p:

        m_p = [ |1/K·Σ_i sign(g_ip)| ≥ τ ]
        d_p = m_p·1/K·Σ_i g_ip

    The authors' code can also divide each layer's d by the fraction of its components that are
    kept, and DomainBed's always does. This is omitted here: an optimizer such as Adam largely
    cancels it.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        tau: τ, between 0 (keep everything) and 1 (keep only components on which all agree).

    Raises:
        TypeError: If `tau` is not a number.
        ValueError: If it is not between 0 and 1.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.ANDMask()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0., 1., 1.])
    """

    tau: float = 0.8

    def __post_init__(self) -> None:
        check_number("tau", self.tau, least=0, most=1)

    def merge(
        self, rows: Float[Tensor, "K n"], noise: Float[Tensor, " n"] | None, prepared: Any
    ) -> Float[Tensor, " n"]:
        count = len(rows)
        # An integer, so that 0.8 of 5 is 4 in every dtype.
        needed = math.ceil(self.tau * count - 1e-9)
        # 1 or 0. torch.where takes longer, and would hide values that are not finite.
        mask = rows.sign().sum(0).abs_().sub_(needed - 0.5).sign_().clamp_(min=0)
        return rows.sum(0).div_(count).mul_(mask)


@dataclass(eq=False)
class SANDMask(ElementwiseRule):
    """The mean, masked smoothly ([Shahtalebi et al., 2021](https://arxiv.org/abs/2106.02266)).

    SAND-mask asks for agreement in magnitude, too. For each parameter p:

        s_p = |1/K·Σ_i sign(g_ip)|
        m_p = max(0, tanh(k·(s_p − τ) / σ_p²))
        d_p = m_p·1/K·Σ_i g_ip

    with σ_p² = Σ_i (g_ip − mean)²/(K − 1), the variance as in the authors' code (it was not
    compared with the paper's text). If σ_p² is 0, or there is one objective only, m_p is 1 if
    s_p > τ and 0 otherwise. DomainBed's code, and optionally the authors', also divides each
    layer's d by the mean of its mask; this is omitted here. The authors' code has no k; DomainBed's
    k is 10 and its τ is 1, which would mask everything here.

    Not homogeneous: σ² is in units of the gradients. Where gradients are small beside 1 the tanh
    is 1, and this is the AND-mask.

    Cost: none beyond the gradients. State: none.

    Args:
        tau: τ, at least 0 and less than 1; 1 would mask everything.
        k: How fast the mask grows, positive.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.SANDMask()(torch.tensor([[-4.0, 1.0, 3.0], [6.0, 1.0, 1.0]]))
        tensor([0.0000, 1.0000, 0.1993])
    """

    tau: float = 0.8
    k: float = 1.0

    degree = None

    def __post_init__(self) -> None:
        check_number("tau", self.tau, least=0, most=1)
        check_number("k", self.k, above=0)
        if not 0 <= self.tau < 1:
            raise ValueError(
                f"tau is {self.tau}; it must be at least 0 and less than 1, where nothing is left"
            )

    def merge(
        self, rows: Float[Tensor, "K n"], noise: Float[Tensor, " n"] | None, prepared: Any
    ) -> Float[Tensor, " n"]:
        count = len(rows)
        mean = rows.sum(0).div_(count)
        excess = rows.sign().sum(0).abs_().div_(count).sub_(self.tau).clamp_(min=0)
        squares = (rows - mean).square_().sum(0)
        # So that 0/0 is 0, and anything else over 0 is so large that tanh is 1.
        squares.clamp_(min=torch.finfo(squares.dtype).tiny)
        mask = excess.mul_(self.k * max(count - 1, 1)).div_(squares).tanh_()
        return mean.mul_(mask)
