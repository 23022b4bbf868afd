"""The α-divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.divergence.f_divergence import FDivergence, inside
from gradkit.divergence.gaussians import excess_affinity


@dataclass(frozen=True)
class Alpha(FDivergence):
    """f(u) = (u^α − 1 − α·(u − 1))/(α·(α − 1)).

    [Amari's family](https://doi.org/10.3390/e12061532): α → 1 is KL, α → 0 reverse KL, 2 half of
    Pearson's χ², −1 half of Neyman's, ½ twice the squared Hellinger distance.
    """

    alpha: int | float = 1.5

    name: ClassVar[str] = "alpha"
    curvature: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        limits = {0: "reverse_kl", 1: "kl"}
        if self.alpha in limits:
            raise ValueError(
                f"alpha is {self.alpha:g}, a limit of the family; take "
                f"f_divergence({limits[int(self.alpha)]!r})"
            )

    def critic(self, log_ratio: float) -> float:
        power = math.exp((self.alpha - 1) * log_ratio)
        if self.alpha > 1:
            return (power - 1) / (self.alpha - 1)
        x = power / (1 - self.alpha)  # softplus(−v)
        return -x - math.log(-math.expm1(-x))

    @property
    def _limit(self) -> float:
        # So that p·u^(α−1) and q·u^α are finite in float32.
        return 60 / max(2.0, abs(self.alpha), abs(self.alpha - 1))

    def _generator(self, u: Tensor) -> Tensor:
        a = self.alpha
        return (u**a - 1 - a * (u - 1)) / (a * (a - 1))

    def _derivative(self, u: Tensor) -> Tensor:
        return (u ** (self.alpha - 1) - 1) / (self.alpha - 1)

    def _conjugate(self, t: Tensor) -> Tensor:
        base = 1 + (self.alpha - 1) * t
        if self.alpha > 1:
            return self._power(base.clamp(min=0))  # below, u = 0 is the best
        base, outside = inside(base, base > 0, 1.0)
        return self._power(base) + outside

    def _power(self, base: Tensor) -> Tensor:
        return (base ** (self.alpha / (self.alpha - 1)) - 1) / self.alpha

    def _activation(self, v: Tensor) -> Tensor:
        return v if self.alpha > 1 else 1 / (1 - self.alpha) - F.softplus(-v)

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        if self.alpha > 1:
            return self._conjugate(v)
        return self._power((1 - self.alpha) * F.softplus(-v))

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        # Both forms are f; neither divides a difference of nearly equal numbers by a small one,
        # the first near α = 1, the second near α = 0.
        a, d = self.alpha, self.alpha - 1
        linear = torch.expm1(log_ratio)
        if abs(d) < abs(a):
            power = torch.exp(log_ratio) * torch.expm1(d * log_ratio) / d
            return q * (power - linear) / a
        return q * (torch.expm1(a * log_ratio) / a - linear) / d

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        excess = excess_affinity(self.alpha, mean_p, variance_p, mean_q, variance_q)
        return excess / (self.alpha * (self.alpha - 1))
