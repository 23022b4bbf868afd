"""The squared Hellinger distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradkit.divergence.f_divergence import FDivergence, inside
from gradkit.divergence.gaussians import excess_affinity


@dataclass(frozen=True)
class Hellinger(FDivergence):
    """f(u) = (√u − 1)²: Σ (√p − √q)², at most 2."""

    name: ClassVar[str] = "hellinger"
    curvature: ClassVar[float | None] = 0.5

    def critic(self, log_ratio: float) -> float:
        return log_ratio / 2

    def _generator(self, u: Tensor) -> Tensor:
        return (u.sqrt() - 1).square()

    def _derivative(self, u: Tensor) -> Tensor:
        return 1 - u.rsqrt()

    def _conjugate(self, t: Tensor) -> Tensor:
        t, outside = inside(t, t < 1, 0.0)
        return t / (1 - t) + outside

    def _activation(self, v: Tensor) -> Tensor:
        return -torch.expm1(-v)

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return torch.expm1(v)

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return q * torch.expm1(log_ratio / 2).square()

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        return -2 * excess_affinity(0.5, mean_p, variance_p, mean_q, variance_q)
