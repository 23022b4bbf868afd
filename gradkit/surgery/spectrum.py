"""Linear systems with a Gram matrix, for gradients that may be dependent or zero.

The rank is computed from cosines, hence scale-invariant, and up to the precision of inner products
of float32 gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradkit.core.gram import accumulator, cosines

DEPENDENT = 1e-7
"""Eigenvalues of a matrix of cosines below this share of the largest count as 0."""

# A sum this small relative to its terms is rounding error.
_CANCELLED = 1e-12


def cosine_solution(
    gram: Float[Tensor, "*batch K K"], target: Float[Tensor, " K"]
) -> tuple[Float[Tensor, "*batch K"], Float[Tensor, "*batch K"]]:
    """The least-squares solution a = C⁺·t of C·a = t, and C·a.

    C is the matrix of cosines, so Σ aᵢ·gᵢ/‖gᵢ‖ is the minimum-norm vector whose projections on the
    gradients' directions are t, or nearest to t. All zeros if t is orthogonal to the range of C.

    Examples:
        >>> gram = torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, 0.0], [2.0, 0.0, 4.0]])
        >>> solution, attained = cosine_solution(gram, torch.tensor([1.0, 1.0, 0.5]))
        >>> solution, attained
        (tensor([0.3750, 1.0000, 0.3750]), tensor([0.7500, 1.0000, 0.7500]))
    """
    values, vectors = torch.linalg.eigh(cosines(gram))
    target = target.expand(values.shape)
    parts = (vectors.mT @ target[..., None])[..., 0]
    independent = _independent(values)
    values, parts = values * independent, parts * independent
    reached = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(target, dim=-1, keepdim=True)
    parts = torch.where(reached > _CANCELLED * norm, parts, torch.zeros_like(parts))
    both = torch.stack([parts * reciprocal(values), parts], dim=-1)
    solution, attained = (vectors @ both).unbind(-1)
    return solution, attained


def rank(gram: Float[Tensor, "*batch K K"]) -> Int[Tensor, "*batch"]:
    """The number of linearly independent gradients.

    Examples:
        >>> rank(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        tensor(1)
    """
    return _independent(torch.linalg.eigvalsh(cosines(gram))).sum(-1)


def _independent(values: Float[Tensor, "*batch K"]) -> Bool[Tensor, "*batch K"]:
    return values > DEPENDENT * values[..., -1:].clamp(min=0)


def reciprocal(numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1/x, and 0 for 0.

    Examples:
        >>> reciprocal(torch.tensor([4.0, 0.0]))
        tensor([0.2500, 0.0000])
    """
    zero = numbers == 0
    return torch.where(zero, numbers, 1 / torch.where(zero, torch.ones_like(numbers), numbers))


def gradient_norms(gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K"]:
    """The gradients' norms."""
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def sum_to_one(weights: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """The weights divided by their sum; all zeros if the sum is 0 up to rounding error.

    Examples:
        >>> sum_to_one(torch.tensor([[1.0, 3.0], [1.0, -1.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    total = weights.sum(-1, keepdim=True)
    vanishes = total.abs() <= _CANCELLED * weights.abs().sum(-1, keepdim=True)
    shares = weights / torch.where(vanishes, torch.ones_like(total), total)
    return torch.where(vanishes, torch.zeros_like(shares), shares)


def widened(
    gram: Float[Tensor, "*batch K K"],
) -> tuple[Float[Tensor, "*batch K K"], Bool[Tensor, "*batch 1"]]:
    """Gram matrices in float64, and which of them are finite; the others become the identity.

    NaNs have no eigenvalues, and comparisons ignore them.
    """
    wide = gram.to(accumulator(gram.device))
    finite = wide.isfinite().all(-1).all(-1)
    identity = torch.eye(gram.shape[-1], dtype=wide.dtype, device=wide.device)
    return torch.where(finite[..., None, None], wide, identity), finite[..., None]


def narrowed(
    weights: Float[Tensor, "*batch K"], finite: Bool[Tensor, "*batch 1"], gram: Tensor
) -> Float[Tensor, "*batch K"]:
    """The weights in the Gram matrix's dtype; NaN where it was not finite."""
    return torch.where(finite, weights, torch.full_like(weights, torch.nan)).to(gram.dtype)
