"""Logits of any meaning as distributions over a few outcomes.

A softmax over C classes is one distribution of C outcomes at each position. Independent sigmoids
are C distributions of two outcomes, present and absent. With both in one layout,
[N, units, outcomes, *positions], a method is written once: there is one unit of C outcomes for a
softmax, and there are C units of two outcomes for sigmoids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gradkit.tta.objectives import (
    Logits,
    Probabilities,
    log_softmax,
    resolve_probabilities,
)
from gradkit.tta.statistics import at_least_float32

Distributions = Float[Tensor, "batch units outcomes *positions"]
PerUnit = Float[Tensor, "batch units *positions"]


def log_distributions(logits: Logits, probabilities: Probabilities = "auto") -> Distributions:
    """Logarithms of the probabilities [N, units, outcomes, *positions] that logits stand for.

    For sigmoids, outcome 0 is that the class is present, and outcome 1 that it is absent. They are
    accurate for any logit.

    Args:
        logits: [N, C, *positions].
        probabilities: See `gradkit.tta.objectives.resolve_probabilities`.

    Raises:
        ValueError: If `probabilities` has no valid value, or for a softmax over a single class.

    Examples:
        >>> log_distributions(torch.zeros(1, 4)).exp()
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
        >>> log_distributions(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 2, 2, 8, 8])
    """
    if resolve_probabilities(probabilities, logits) == "softmax":
        return log_softmax(logits).unsqueeze(1)
    z = at_least_float32(logits)
    return torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], dim=2)


def entropies(log_p: Distributions) -> PerUnit:
    """−Σ p·log p of each distribution, in nats; at most the logarithm of the number of outcomes.

    Examples:
        >>> entropies(log_distributions(torch.zeros(1, 4)))  # log 4
        tensor([[1.3863]])
    """
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # 0·∞ would be NaN
    return -(log_p.exp() * finite).sum(dim=2)


def threshold_of(log_p: Distributions, share: float = 0.4) -> float:
    """E₀ = share·ln K for K outcomes, below which SAR and EATA call a prediction reliable.

    Examples:
        >>> round(threshold_of(log_distributions(torch.zeros(1, 2, 8, 8))), 4)  # 0.4·ln 2
        0.2773
    """
    return share * math.log(log_p.shape[2])


def cross_entropies(target: Distributions, log_p: Distributions) -> PerUnit:
    """−Σ q·log p of each distribution, with q the target's probabilities.

    Examples:
        >>> uniform = log_distributions(torch.zeros(1, 4))
        >>> cross_entropies(uniform.exp(), uniform)
        tensor([[1.3863]])
    """
    return -(target * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=2)


def to_logits(p: Distributions, probabilities: Probabilities, like: Logits) -> Logits:
    """Logits [N, C, *positions] that stand for these probabilities.

    Args:
        p: [N, units, outcomes, *positions]; they need not sum to exactly 1.
        probabilities: What logits mean; see `gradkit.tta.objectives.resolve_probabilities`.
        like: Logits whose shape decides on "auto", and whose dtype the result gets.

    Examples:
        >>> z = torch.tensor([[0.5, -1.0, 2.0]])
        >>> p = log_distributions(z, "sigmoid").exp()
        >>> to_logits(p, "sigmoid", z)
        tensor([[ 0.5000, -1.0000,  2.0000]])
    """
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    if resolve_probabilities(probabilities, like) == "softmax":
        return log_p.squeeze(1).to(like.dtype)
    return (log_p[:, :, 0] - log_p[:, :, 1]).to(like.dtype)
