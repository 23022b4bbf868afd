"""The weights of α-fair and Nash bargaining."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradkit.surgery.solvers.active_set import matvec
from gradkit.surgery.solvers.prepared import prepare

# Added to the matrix of cosines where there is no solution. Two vectors then count as opposite if
# their cosine is below −1 + ε, and the effect of rounding errors, 1e-16/ε, stays far below 1.
_RIDGE = {torch.float64: 1e-10, torch.float32: 1e-5}


@torch.no_grad()
def fair_weights(
    gram: Float[Tensor, "*batch K K"], alpha: float = 1.0
) -> Float[Tensor, "*batch K"]:
    """The solution a > 0 of G·a = a^(−1/α), elementwise.

    FairGrad's weights ([Ban & Ji, ICML 2024](https://arxiv.org/abs/2402.15638)); with α = 1 those
    of Nash-MTL, G·a = 1/a ([Navon et al., ICML 2022](https://arxiv.org/abs/2202.01017)). They
    minimise ½aᵀGa − Σφ(aᵢ), where φ' = a^(−1/α). Newton's method is damped by a step length that
    provably lowers this objective, so it needs no line search.

    Rows of zeros have weight 0 and are ignored. There is no solution if a convex combination of the
    other rows is 0. Then 1e-10·diag(G) is added to G. This makes the weights large, up to 1e5 times
    the usual for α = 1, and gives exactly opposite rows weights that cancel.

    Args:
        gram: G, semidefinite up to rounding errors.
        alpha: α > 0.

    Raises:
        ValueError: If `alpha` is not positive.

    Examples:
        >>> fair_weights(torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        tensor([0.5000, 0.3333])
        >>> fair_weights(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), alpha=0.5)
        tensor([0.6300, 0.4807])
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}; it must be positive")
    count = gram.shape[-1]
    cosines, norms, finite = prepare(gram)
    zero = gram.diagonal(dim1=-2, dim2=-1) <= 0
    # A row of zeros becomes one that is orthogonal to all others.
    cosines = cosines + torch.diag_embed(zero.to(cosines))
    # With aᵢ = nᵢ^(−2α/(1+α))·bᵢ and y = r·b the equations are C·y = r·b^(−1/α).
    scale = norms ** ((1 - alpha) / (1 + alpha))
    scale = scale / scale.amax(-1, keepdim=True)
    ridge = _RIDGE[cosines.dtype]
    identity = torch.eye(count, dtype=cosines.dtype, device=cosines.device)
    regular = cosines + ridge * identity
    # The best multiple of r.
    across = (scale * matvec(regular, scale)).sum(-1, keepdim=True)
    start = ((scale * scale).sum(-1, keepdim=True) / across) ** (alpha / (1 + alpha))
    regular_ratio, _ = _newton(regular, scale, start.expand_as(scale), alpha, steps=200)
    exact_ratio, settled = _newton(cosines, scale, regular_ratio, alpha, steps=12)
    # If the ridge has reduced the weights a lot, there is no solution without it.
    settled &= (exact_ratio <= 4 * regular_ratio).all(-1)
    ratio = torch.where(settled[..., None], exact_ratio, regular_ratio)
    weights = (norms ** (-2 * alpha / (1 + alpha)) * ratio).masked_fill(zero, 0)
    return weights.masked_fill(~finite[..., None], torch.nan).to(gram.dtype)


def _newton(
    gram: Float[Tensor, "*batch K K"],
    scale: Float[Tensor, "*batch K"],
    ratio: Float[Tensor, "*batch K"],
    alpha: float,
    steps: int,
) -> tuple[Float[Tensor, "*batch K"], Bool[Tensor, "*batch"]]:
    """The solution b of C·(r·b) = r·b^(−1/α), from an initial b, and whether it has converged."""
    size = torch.full_like(ratio[..., 0], torch.inf)
    for _ in range(steps):
        point = scale * ratio
        pull = ratio ** (-1 / alpha)
        hessian = gram + torch.diag_embed(pull / (alpha * ratio))
        factor = torch.linalg.cholesky_ex(hessian).L
        residual = (scale * pull - matvec(gram, point)).unsqueeze(-1)
        change = torch.cholesky_solve(residual, factor).squeeze(-1) / point
        # The second derivative of −φ grows at most by (1 − δ)^(−1−1/α) while no coordinate falls
        # by more than the fraction δ, which bounds the objective along the step from above. This
        # is the step that minimises the bound; it tends to 1 quadratically.
        fall = (-change).amax(-1, keepdim=True).clamp(min=1e-30)
        step = (-torch.expm1(-alpha * torch.log1p(fall / alpha))).clamp(max=0.999) / fall
        ratio = ratio * (1 + step.clamp(max=1) * change)
        before, size = size, change.abs().amax(-1)
        # It stops at rounding error, which is large if G is nearly singular.
        settled = (size <= 1e-8) | ((size < 1e-4) & (size > before / 2))
        if not (~settled & size.isfinite()).any():
            break
    return ratio, settled
