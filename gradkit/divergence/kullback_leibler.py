"""The Kullback-Leibler divergence, its reverse, and the sum of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.divergence.f_divergence import FDivergence, inside
from gradkit.divergence.gaussians import kullback_leibler


@dataclass(frozen=True)
class KL(FDivergence):
    """f(u) = u·ln u: Σ p·ln(p/q)."""

    name: ClassVar[str] = "kl"
    curvature: ClassVar[float | None] = 1.0

    def critic(self, log_ratio: float) -> float:
        return 1 + log_ratio

    def _generator(self, u: Tensor) -> Tensor:
        return torch.xlogy(u, u)

    def _derivative(self, u: Tensor) -> Tensor:
        return 1 + torch.log(u)

    def _conjugate(self, t: Tensor) -> Tensor:
        return torch.exp(t - 1)

    def _activation(self, v: Tensor) -> Tensor:
        return v

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return torch.exp(v - 1)

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return p * (log_ratio + torch.expm1(-log_ratio))

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        return kullback_leibler(mean_p, variance_p, mean_q, variance_q)


@dataclass(frozen=True)
class ReverseKL(FDivergence):
    """f(u) = −ln u: Σ q·ln(q/p)."""

    name: ClassVar[str] = "reverse_kl"
    curvature: ClassVar[float | None] = 1.0

    def critic(self, log_ratio: float) -> float:
        return log_ratio

    def _generator(self, u: Tensor) -> Tensor:
        return -torch.log(u)

    def _derivative(self, u: Tensor) -> Tensor:
        return -1 / u

    def _conjugate(self, t: Tensor) -> Tensor:
        t, outside = inside(t, t < 0, -1.0)
        return -1 - torch.log(-t) + outside

    def _activation(self, v: Tensor) -> Tensor:
        return -torch.exp(-v)

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return v - 1

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return q * (torch.expm1(log_ratio) - log_ratio)

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        return kullback_leibler(mean_q, variance_q, mean_p, variance_p)


@dataclass(frozen=True)
class Jeffreys(FDivergence):
    """f(u) = (u − 1)·ln u: KL and reverse KL added."""

    name: ClassVar[str] = "jeffreys"
    curvature: ClassVar[float | None] = 2.0

    def critic(self, log_ratio: float) -> float:
        return log_ratio + 1 - math.exp(-log_ratio)

    def _generator(self, u: Tensor) -> Tensor:
        return (u - 1) * torch.log(u)

    def _derivative(self, u: Tensor) -> Tensor:
        return torch.log(u) + 1 - 1 / u

    def _conjugate(self, t: Tensor) -> Tensor:
        # With W = LambertW(e^(1−t)), ln W + W = 1 − t: W + 1/W + t − 2 without cancellation.
        log_w = log_wright_omega(1 - t)
        return torch.exp(-log_w) - log_w - 1

    def _activation(self, v: Tensor) -> Tensor:
        return v

    def _conjugate_of_activation(self, v: Tensor) -> Tensor:
        return self._conjugate(v)

    def _summands(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return q * torch.expm1(log_ratio) * log_ratio

    def _between_gaussians(
        self, mean_p: Tensor, variance_p: Tensor, mean_q: Tensor, variance_q: Tensor
    ) -> Tensor:
        forward = kullback_leibler(mean_p, variance_p, mean_q, variance_q)
        return forward + kullback_leibler(mean_q, variance_q, mean_p, variance_p)


def log_wright_omega(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The real y with e^y + y = z, the logarithm of LambertW(e^z).

    Newton's method from above, where the function is convex and increasing: the error shrinks in
    every step.

    Examples:
        >>> log_wright_omega(torch.tensor(1.0))  # LambertW(e) is 1
        tensor(0.)
    """
    y = torch.minimum(z, torch.log(z.clamp(min=1)))
    for _ in range(8):
        w = torch.exp(y)
        y = y - (w + y - z) / (w + 1)
    return y
