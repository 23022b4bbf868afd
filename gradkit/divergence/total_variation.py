"""The total variation distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradkit.divergence.f_divergence import FDivergence, inside


@dataclass(frozen=True)
class TotalVariation(FDivergence):
    """f(u) = ½·|u − 1|: ½·Σ |p − q|, at most 1. Where p = q its subgradient is 0."""

    name: ClassVar[str] = "tv"
    curvature: ClassVar[float | None] = None

    def critic(self, log_ratio: float) -> float:
        return math.copysign(math.inf, log_ratio) if log_ratio else 0.0

    def _generator(self, u: Tensor) -> Tensor:
        return (u - 1).abs() / 2

    def _derivative(self, u: Tensor) -> Tensor:
        return torch.sign(u - 1) / 2

    def _conjugate(self, t: Tensor) -> Tensor:
        t, outside = inside(t, t <= 0.5, 0.0)
        return t.clamp(min=-0.5) + outside  # below, u = 0 is the best

    def _activation(self, v: Tensor) -> Tensor:
        return torch.tanh(v) / 2

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return torch.tanh(v) / 2

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return (q * torch.expm1(log_ratio)).abs() / 2
