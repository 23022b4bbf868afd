"""Integrals of normal distributions with diagonal covariances."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.divergence.floor import lowered

_HIGHEST = 60.0  # of a logarithm: e^60 is finite in float32


def kullback_leibler(
    mean_p: Float[Tensor, "*batch C"],
    variance_p: Float[Tensor, "*batch C"],
    mean_q: Float[Tensor, "*batch C"],
    variance_q: Float[Tensor, "*batch C"],
) -> Float[Tensor, "*batch"]:
    """KL(P‖Q) = ½·Σ [σ_p²/σ_q² − 1 − ln(σ_p²/σ_q²) + (μ_p − μ_q)²/σ_q²]."""
    excess = (variance_p - variance_q) / variance_q
    # Each logarithm where it is exact: far below σ_q² the excess is rounded to −1.
    near = excess.abs() < 0.5
    log_near = torch.log1p(torch.where(near, excess, 0.0))
    log_far = torch.log(variance_p) - torch.log(variance_q)
    square = (mean_p - mean_q).square() / variance_q
    return (excess - torch.where(near, log_near, log_far) + square).sum(-1) / 2


def excess_affinity(
    alpha: float,
    mean_p: Float[Tensor, "*batch C"],
    variance_p: Float[Tensor, "*batch C"],
    mean_q: Float[Tensor, "*batch C"],
    variance_q: Float[Tensor, "*batch C"],
) -> Float[Tensor, "*batch"]:
    """∫ p^α·q^(1−α) − 1; infinite where α·σ_q² + (1 − α)·σ_p² ≤ 0.

    With s = α·σ_q² + (1 − α)·σ_p² the integral's logarithm is the sum over dimensions of

        ½·ln(σ_p^(2(1−α))·σ_q^(2α) / s) − ½·α·(1 − α)·(μ_p − μ_q)²/s

    It is bounded by 60, with the gradient at the bound.
    """
    log_ratio = torch.log(variance_p) - torch.log(variance_q)
    share = (1 - alpha) * torch.expm1(log_ratio)  # s/σ_q² − 1
    finite = share > -1
    share = torch.where(finite, share, 0.0)
    square = (mean_p - mean_q).square() / (variance_q * (1 + share))
    logs = (1 - alpha) * log_ratio - torch.log1p(share) - alpha * (1 - alpha) * square
    result = torch.expm1(lowered(logs.sum(-1) / 2, _HIGHEST))
    return torch.where(finite.all(-1), result, torch.inf)
