"""The Jensen-Shannon divergence, and the one that the first GANs minimise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkit.divergence.f_divergence import FDivergence, inside

_LOG_2 = math.log(2)


@dataclass(frozen=True)
class JS(FDivergence):
    """f(u) = u·ln u − (u + 1)·ln((u + 1)/2): KL(P‖M) + KL(Q‖M) with M = (P + Q)/2.

    This is f-GAN's: twice the Jensen-Shannon divergence in its usual scale, at most 2·ln 2.
    """

    name: ClassVar[str] = "js"
    curvature: ClassVar[float | None] = 0.5

    def critic(self, log_ratio: float) -> float:
        return log_ratio

    def _generator(self, u: Tensor) -> Tensor:
        return torch.xlogy(u, u) - (u + 1) * torch.log((u + 1) / 2)

    def _derivative(self, u: Tensor) -> Tensor:
        return torch.log(2 * u / (u + 1))

    def _conjugate(self, t: Tensor) -> Tensor:
        t, outside = inside(t, t < _LOG_2, 0.0)
        return -torch.log(2 - torch.exp(t)) + outside

    def _activation(self, v: Tensor) -> Tensor:
        return _LOG_2 - F.softplus(-v)

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return F.softplus(v) - _LOG_2

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        # p·ln(p/m) + q·ln(q/m) with m = (p + q)/2 and h = ½·ln(p/q):
        # ln(p/m) = h − ln cosh h, ln(q/m) = −h − ln cosh h, p − q = (p + q)·tanh h.
        h = log_ratio / 2
        log_cosh = torch.log1p(torch.sinh(h).square()) / 2
        return (p + q) * (h * torch.tanh(h) - log_cosh)


@dataclass(frozen=True)
class GAN(JS):
    """f(u) = u·ln u − (u + 1)·ln(u + 1): that of JS minus 2·ln 2, also where P = Q."""

    name: ClassVar[str] = "gan"
    zero: ClassVar[float] = -2 * _LOG_2

    def _generator(self, u: Tensor) -> Tensor:
        return torch.xlogy(u, u) - (u + 1) * torch.log1p(u)

    def _derivative(self, u: Tensor) -> Tensor:
        return torch.log(u / (u + 1))

    def _conjugate(self, t: Tensor) -> Tensor:
        t, outside = inside(t, t < 0, -1.0)
        return -torch.log(-torch.expm1(t)) + outside

    def _activation(self, v: Tensor) -> Tensor:
        return -F.softplus(-v)

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return F.softplus(v)
