"""Eigenvalues and trace of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator

Product = Callable[[Float[Tensor, " P"]], Float[Tensor, " P"]]
"""v → H·v."""


@dataclass(frozen=True)
class Spectrum:
    """The largest eigenvalues of a symmetric matrix.

    Attributes:
        values: The eigenvalues, the largest first.
        errors: For each the norm of the residual ‖H·v − λ·v‖, or the rounding error of H·v where
            that is more: an eigenvalue of H is at most so far away.
        vector: The unit eigenvector v [P] of the largest.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vector: Float[Tensor, " P"]


def largest_eigenvalues(
    product: Product,
    like: Float[Tensor, " P"],
    count: int,
    *,
    iterations: int,
    tolerance: int | float,
    generator: torch.Generator,
) -> Spectrum:
    """The largest eigenvalues by [Lanczos' method](https://doi.org/10.6028/jres.045.026).

        w = H·qⱼ,   αⱼ = qⱼ·w,   w ← w − Σᵢ (qᵢ·w)·qᵢ  twice,   βⱼ = ‖w‖,   qⱼ₊₁ = w/βⱼ

    The eigenvalues of the tridiagonal matrix of αⱼ and βⱼ approach the outer ones of H. Every new
    vector is orthogonalised against all earlier ones (Σ), without which rounding brings back copies
    of eigenvalues that have converged. It ends once the residuals of all that are wanted are small.

    Where the vectors span an invariant subspace (β = 0) it goes on from a new random vector, unless
    one eigenvalue is wanted. An eigenvalue of H that occurs several times is found once before.

    Args:
        product: v → H·v, for vectors of the dtype and device of `like`.
        like: A vector [P], for dtype and device; the qⱼ are kept in this dtype, α and β in float64.
        count: How many eigenvalues, at most P.
        iterations: The most products.
        tolerance: What residuals may be, in units of the eigenvalue of largest magnitude.
        generator: For the first vector.

    Examples:
        >>> matrix = torch.diag(torch.tensor([1.0, 5.0, -7.0, 3.0]))
        >>> found = largest_eigenvalues(
        ...     matrix.mv, torch.zeros(4), 2, iterations=10, tolerance=1e-3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> [round(value, 4) for value in found.values]
        [5.0, 3.0]
    """
    wide = accumulator(like.device)
    size = like.numel()
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    w, length = _fresh(like, basis, generator)
    while True:
        q = (w / length).to(like.dtype)
        basis.append(q)
        w = product(q).to(wide)
        alphas.append(float(q.to(wide) @ w))
        before = float(torch.linalg.vector_norm(w))
        _orthogonalise(w, basis)
        length = float(torch.linalg.vector_norm(w))
        exhausted = length <= 10 * torch.finfo(like.dtype).eps * max(before, *map(abs, alphas))
        values, vectors = _ritz(alphas, betas)
        wanted = range(len(alphas) - 1, len(alphas) - 1 - min(count, len(alphas)), -1)
        largest = float(values.abs().max())
        rounding = torch.finfo(like.dtype).eps * largest
        errors = [max(length * abs(float(vectors[-1, n])), rounding) for n in wanted]
        enough = len(alphas) >= count and max(errors) <= max(tolerance * largest, rounding)
        if (enough and (count == 1 or not exhausted)) or len(alphas) == min(iterations, size):
            break
        if exhausted:
            betas.append(0.0)
            w, length = _fresh(like, basis, generator)
        else:
            betas.append(length)
    top = torch.zeros_like(w)
    for q, share in zip(basis, vectors[:, -1].tolist(), strict=True):
        top += share * q
    return Spectrum(
        tuple(float(values[n]) for n in wanted),
        tuple(errors),
        (top / torch.linalg.vector_norm(top)).to(like.dtype),
    )


def _fresh(like: Tensor, basis: list[Tensor], generator: torch.Generator) -> tuple[Tensor, float]:
    """A random vector orthogonal to the basis, and its norm."""
    drawn = torch.randn(like.numel(), generator=generator, dtype=torch.float64, device="cpu")
    w = drawn.to(like.device, accumulator(like.device))
    _orthogonalise(w, basis)
    return w, float(torch.linalg.vector_norm(w))


def _orthogonalise(w: Tensor, basis: list[Tensor]) -> None:
    for _ in range(2):  # once leaves what rounding has left; twice is enough
        for q in basis:
            row = q.to(w.dtype)
            w -= (row @ w) * row


def _ritz(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, in ascending order, and eigenvectors of the tridiagonal matrix."""
    off, diagonal = (
        torch.tensor(each, dtype=torch.float64, device="cpu") for each in (betas, alphas)
    )
    matrix = torch.diag(diagonal)
    values, vectors = torch.linalg.eigh(matrix + torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors


def estimated_trace(
    product: Product, like: Float[Tensor, " P"], samples: int, generator: torch.Generator
) -> tuple[float, float]:
    """The trace by [Hutchinson's estimator](https://doi.org/10.1080/03610919008812866).

        tr H = E[z·H·z]      the components of z are ±1, each as likely

    Args:
        product: v → H·v, for vectors of the dtype and device of `like`.
        like: A vector [P], for dtype and device.
        samples: How many z, at least 2.
        generator: For z.

    Returns:
        The mean over the samples, and its standard error.

    Examples:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0]))  # exact where H is diagonal
        >>> estimated_trace(matrix.mv, torch.zeros(2), 3, torch.Generator().manual_seed(0))
        (3.0, 0.0)
    """
    wide = accumulator(like.device)
    found: list[float] = []
    for _ in range(samples):
        coins = torch.randint(
            2, (like.numel(),), generator=generator, dtype=torch.int8, device="cpu"
        )
        z = (coins * 2 - 1).to(like.device, like.dtype)
        found.append(float(z.to(wide) @ product(z).to(wide)))
    mean = math.fsum(found) / samples
    variance = math.fsum((value - mean) ** 2 for value in found) / (samples - 1)
    return mean, math.sqrt(variance / samples)
