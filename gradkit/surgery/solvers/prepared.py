"""Preparation of Gram matrices: cosines, norms, and a positive semidefinite matrix."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradkit.core.gram import accumulator, cosines


def prepare(
    gram: Float[Tensor, "*batch K K"],
) -> tuple[Float[Tensor, "*batch K K"], Float[Tensor, "*batch K"], Bool[Tensor, "*batch"]]:
    """The matrix of cosines, in the dtype to compute in, and the rows' norms.

    Rounding errors may have made a few eigenvalues negative. This is corrected by a multiple of the
    identity; see `semidefinite`.

    Returns:
        The cosines, semidefinite; the norms, where 0 is replaced by the least positive norm (or 1);
        and which matrices are finite. Matrices that are not finite are replaced by zeros.
    """
    wide = gram.to(accumulator(gram.device))
    finite = wide.isfinite().flatten(-2).all(-1)
    wide = torch.where(finite[..., None, None], wide, 0.0)
    norms = wide.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    least = torch.where(norms > 0, norms, torch.inf).amin(-1, keepdim=True)
    least = torch.where(least.isinf(), 1.0, least)
    return semidefinite(cosines(wide)), torch.where(norms > 0, norms, least), finite


def semidefinite(gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K K"]:
    """The matrix plus the least tried multiple of the identity that makes it semidefinite.

    Examples:
        >>> semidefinite(torch.tensor([[1.0, 0.0], [0.0, -0.002]], dtype=torch.float64))
        tensor([[1.0165, 0.0000],
                [0.0000, 0.0145]], dtype=torch.float64)
    """
    least = ridge(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    failed = torch.linalg.cholesky_ex(gram + least * identity).info > 0
    shift = least
    while failed.any() and shift <= gram.shape[-1]:
        shift *= 10
        mended = gram + shift * identity
        still = failed & (torch.linalg.cholesky_ex(mended).info > 0)
        gram = torch.where((failed & ~still)[..., None, None], mended, gram)
        failed = still
    return gram


def ridge(gram: Tensor) -> float:
    """The weight ε of the proximal term: 1.6e-10 in float64."""
    return float(torch.finfo(gram.dtype).eps ** 0.625)
