"""Quadratic programs over the probability simplex, and the projection onto it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator
from gradkit.surgery.solvers.active_set import minimise, over_simplex
from gradkit.surgery.solvers.prepared import prepare


@torch.no_grad()
def simplex_minimum(
    gram: Float[Tensor, "*batch K K"], linear: Float[Tensor, "*batch K"] | None = None
) -> Float[Tensor, "*batch K"]:
    """The minimiser w of ½wᵀGw + qᵀw over w ≥ 0, Σw = 1.

    Without q, w gives the minimum-norm point in the convex hull of the vectors whose Gram matrix is
    G. Of several minimisers it is about the one with the smallest Σ Gᵢᵢwᵢ² (with q, Σ wᵢ²), which
    does not depend on the vectors' order and gives equal vectors equal weights.

    Args:
        gram: G, semidefinite up to rounding errors.
        linear: q; None is 0.

    Examples:
        >>> simplex_minimum(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.6000, 0.4000])
        >>> simplex_minimum(torch.eye(3), torch.tensor([0.0, 0.0, 1.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    count = gram.shape[-1]
    if count <= 2:
        return _of_two(gram, linear) if count == 2 else gram[..., 0] * 0 + 1
    matrix, norms, finite = prepare(gram)
    unit = norms.amax(-1, keepdim=True)
    slopes = torch.zeros_like(norms)
    if linear is not None:
        slopes = linear.to(norms)
        finite = finite & slopes.isfinite().all(-1)
        # A constant in q changes only rounding errors.
        slopes = torch.where(finite[..., None], slopes - slopes.amin(-1, keepdim=True), 0.0)
        size = torch.maximum(unit**2, slopes.amax(-1, keepdim=True))
        slopes = slopes / size
        # Relative to q, the curvature along small rows is lost in rounding: rows keep their norms.
        scaled = norms / size.sqrt()
        matrix = matrix * scaled.unsqueeze(-1) * scaled.unsqueeze(-2)
        norms = unit.expand_as(norms)
    normal = unit / norms
    problem = over_simplex(
        matrix.reshape(-1, count, count), slopes.reshape(-1, count), normal.reshape(-1, count)
    )
    point, _, _ = minimise(problem, torch.ones_like(problem.linear, dtype=torch.bool))
    weights = point.reshape(norms.shape) * normal
    return normalise(weights).masked_fill(~finite[..., None], torch.nan).to(gram.dtype)


def normalise(weights: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """Weights on the simplex up to rounding errors, normalised to lie on it."""
    weights = weights.clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def _of_two(
    gram: Float[Tensor, "*batch 2 2"], linear: Float[Tensor, "*batch 2"] | None
) -> Float[Tensor, "*batch 2"]:
    wide = gram.to(accumulator(gram.device))
    cross, (first, second) = wide[..., 0, 1], wide.diagonal(dim1=-2, dim2=-1).unbind(-1)
    excess, square = second - cross, (first - cross) + (second - cross)
    if linear is not None:
        excess = excess + (linear[..., 1].to(wide) - linear[..., 0].to(wide))
    # For a quotient by 0 the clamp gives the weight 0 or 1, depending on the sign.
    weight = (excess / square.clamp(min=0)).clamp(0, 1)
    weight = torch.where((excess == 0) & (square <= 0), 0.5, weight)
    return torch.stack([weight, 1 - weight], -1).to(gram.dtype)


@torch.no_grad()
def project_onto_simplex(vector: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """The Euclidean projection onto w ≥ 0, Σw = 1 ([Held et al., 1974]).

    w = max(v − τ, 0), where τ = (Σ of the ρ largest v − 1)/ρ for the largest ρ that leaves the
    ρ-th largest above τ.

    [Held et al., 1974]: https://doi.org/10.1007/BF01580223

    Examples:
        >>> project_onto_simplex(torch.tensor([0.5, 1.0, -3.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """
    wide = vector.to(accumulator(vector.device))
    # Differences from the largest lose fewer digits.
    wide = wide - wide.amax(-1, keepdim=True)
    ordered = wide.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, vector.shape[-1] + 1, dtype=wide.dtype, device=wide.device)
    thresholds = (ordered.cumsum(-1) - 1) / ranks
    # τ is the largest of the thresholds.
    return (wide - thresholds.amax(-1, keepdim=True)).clamp(min=0).to(vector.dtype)
