"""A check that a matrix can be a Gram matrix."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# The tolerance of cosines: the rounding error of inner products of long float32 vectors.
_ROUNDING = 1e-3
# A lower bound on norms relative to the largest; below it cosines would be rounding noise.
_SHORT = 1e-6


def check_gram_matrix(
    who: object, gram: Float[Tensor, "*batch K K"], *, symmetric: bool = True
) -> None:
    """Check that matrices are Gram matrices up to rounding errors.

    The values are copied to the host, which waits for an accelerator.

    Args:
        who: The rule, for messages.
        gram: Square matrices.
        symmetric: Whether they must be symmetric and positive semidefinite.

    Raises:
        ValueError: If an element is not finite, or if a matrix is not symmetric or has a negative
            eigenvalue.

    Examples:
        >>> check_gram_matrix("rule", torch.ones(2, 2))
        >>> check_gram_matrix("rule", torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        Traceback (most recent call last):
        ...
        ValueError: rule takes Gram matrices, which have no negative eigenvalue, and this one has \
the eigenvalue -1; pass J @ J.T of the gradients J
    """
    tolerance = max(_ROUNDING, 32 * torch.finfo(gram.dtype).eps)
    matrices = gram.detach().to("cpu", torch.float64).reshape(-1, *gram.shape[-2:])
    for number, finite in enumerate(matrices.isfinite().flatten(1).all(1).tolist()):
        if not finite:
            matrix = matrices[number]
            i, j = (~matrix.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{who!s} takes finite Gram matrices, and {_which(gram, number)} holds "
                f"{matrix[i, j].item()} at [{i}, {j}]; look at the gradients it was made of"
            )
    if not symmetric:
        return
    norms = matrices.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    norms = norms.clamp(min=_SHORT * norms.amax(-1, keepdim=True))
    # For rows of zeros, so that nothing is divided by 0.
    largest = matrices.abs().amax((-2, -1)).sqrt().unsqueeze(-1)
    norms = torch.where(norms > 0, norms, _SHORT * largest)
    norms = torch.where(norms > 0, norms, 1.0)
    cosines = matrices / norms.unsqueeze(-1) / norms.unsqueeze(-2)
    for number, off in enumerate((cosines - cosines.mT).abs().flatten(1).amax(1).tolist()):
        if off > tolerance:
            matrix, places = matrices[number], (cosines[number] - cosines[number].T).abs()
            i, j = divmod(int(places.argmax()), len(matrix))
            raise ValueError(
                f"{who!s} takes Gram matrices, which are symmetric, and {_which(gram, number)} has "
                f"{matrix[i, j].item():g} at [{i}, {j}] and {matrix[j, i].item():g} at [{j}, {i}]; "
                "pass J @ J.T of the gradients J"
            )
    shifted = (cosines + cosines.mT) / 2
    shifted.diagonal(dim1=-2, dim2=-1).add_(tolerance)
    for number, failed in enumerate(torch.linalg.cholesky_ex(shifted).info.tolist()):
        if failed:
            least = torch.linalg.eigvalsh((matrices[number] + matrices[number].T) / 2)[0].item()
            raise ValueError(
                f"{who!s} takes Gram matrices, which have no negative eigenvalue, and "
                f"{_which(gram, number)} has the eigenvalue {least:g}; pass J @ J.T of the "
                "gradients J"
            )


def _which(gram: Tensor, number: int) -> str:
    if gram.dim() == 2:
        return "this one"
    place = np.unravel_index(number, gram.shape[:-2])
    return f"that at [{', '.join(map(str, place))}]"
