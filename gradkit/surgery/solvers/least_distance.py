"""The vector nearest to one gradient under constraints from the others."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradkit.surgery.solvers.nonnegative import nonnegative_minimum


@torch.no_grad()
def least_distance(
    gram: Float[Tensor, "*batch K K"], bounds: Float[Tensor, "*batch L"]
) -> tuple[Float[Tensor, "*batch K"], Bool[Tensor, "*batch"]]:
    """The weights of the vector d nearest to g₁ with gⱼ·d ≥ bⱼ for the other K − 1 = L rows.

    d = g₁ + Σⱼ μⱼgⱼ, where μ ≥ 0 minimises the dual ½μᵀG_sμ − (b − G_s1)ᵀμ; s stands for the
    rows from the second.

    Args:
        gram: G, semidefinite up to rounding errors.
        bounds: b.

    Returns:
        The weights (1, μ), and whether there is such a vector. If there is none, the weights are
        (1, 0, …, 0).

    Raises:
        ValueError: If there is not one bound for each row but the first.

    Examples:
        >>> least_distance(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.tensor([16.0]))
        (tensor([1., 1.]), tensor(True))
    """
    if bounds.shape[-1] != gram.shape[-1] - 1:
        raise ValueError(
            f"there are {bounds.shape[-1]} bounds for {gram.shape[-1]} rows; pass one for each "
            "row but the first"
        )
    if gram.shape[-1] == 1:
        return torch.ones_like(gram[..., 0]), torch.ones_like(gram[..., 0, 0], dtype=torch.bool)
    multipliers, feasible = nonnegative_minimum(gram[..., 1:, 1:], gram[..., 1:, 0] - bounds)
    return torch.cat([torch.ones_like(gram[..., :1, 0]), multipliers], -1), feasible
