"""The projection onto the dual cone of gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.surgery.solvers.nonnegative import solve
from gradkit.surgery.solvers.prepared import prepare


@torch.no_grad()
def project_onto_dual_cone(
    gram: Float[Tensor, "*batch K K"], weights: Float[Tensor, "*batch M K"]
) -> Float[Tensor, "*batch M K"]:
    """The weights v that minimise vᵀGv over v ≥ u, for each u.

    Jᵀv is the vector nearest to Jᵀu that has no negative inner product with a row of J, where
    G = J·Jᵀ ([Quinton & Rey, 2024](https://arxiv.org/abs/2406.16232), proposition 1).

    Args:
        gram: G, semidefinite up to rounding errors.
        weights: M vectors u for each G.

    Examples:
        >>> gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]])
        >>> project_onto_dual_cone(gram, torch.eye(2))
        tensor([[1.0000, 0.5789],
                [1.2222, 1.0000]])
    """
    cosines, norms, finite = prepare(gram)
    norms = norms[..., None, :]
    target = weights.to(norms) * norms
    change, _ = solve(cosines[..., None, :, :], target @ cosines)
    finite = finite[..., None] & weights.isfinite().all(-1)
    result = weights.to(norms) + change / norms
    return result.masked_fill(~finite[..., None], torch.nan).to(gram.dtype)
