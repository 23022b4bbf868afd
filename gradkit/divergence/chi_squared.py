"""The χ² divergences of Pearson and Neyman."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradkit.divergence.f_divergence import FDivergence, inside
from gradkit.divergence.gaussians import excess_affinity


@dataclass(frozen=True)
class Pearson(FDivergence):
    """f(u) = (u − 1)²: Σ (p − q)²/q."""

    name: ClassVar[str] = "pearson"
    curvature: ClassVar[float | None] = 2.0

    def critic(self, log_ratio: float) -> float:
        return 2 * math.expm1(log_ratio)

    def _generator(self, u: Tensor) -> Tensor:
        return (u - 1).square()

    def _derivative(self, u: Tensor) -> Tensor:
        return 2 * (u - 1)

    def _conjugate(self, t: Tensor) -> Tensor:
        t = t.clamp(min=-2)  # below, u = 0 is the best
        return t.square() / 4 + t

    def _activation(self, v: Tensor) -> Tensor:
        return v

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return self._conjugate(v)

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return q * torch.expm1(log_ratio).square()

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        return excess_affinity(2.0, mean_p, variance_p, mean_q, variance_q)


@dataclass(frozen=True)
class Neyman(FDivergence):
    """f(u) = (1 − u)²/u: Σ (p − q)²/p."""

    name: ClassVar[str] = "neyman"
    curvature: ClassVar[float | None] = 2.0

    def critic(self, log_ratio: float) -> float:
        return 2 * log_ratio

    def _generator(self, u: Tensor) -> Tensor:
        return (1 - u).square() / u

    def _derivative(self, u: Tensor) -> Tensor:
        return 1 - u ** (-2)

    def _conjugate(self, t: Tensor) -> Tensor:
        t, outside = inside(t, t < 1, 0.0)
        return 2 - 2 * torch.sqrt(1 - t) + outside

    def _activation(self, v: Tensor) -> Tensor:
        return -torch.expm1(-v)

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return -2 * torch.expm1(-v / 2)

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return p * torch.expm1(-log_ratio).square()

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        return excess_affinity(-1.0, mean_p, variance_p, mean_q, variance_q)
