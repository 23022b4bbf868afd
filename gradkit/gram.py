"""Inner products of flat vectors: Gram matrices, norms, cosines.

Every inner product of the library goes through one blocked reduction. A plain float32 product
of vectors of tens of millions of numbers is wrong in the third digit on a CPU; products of
blocks of 2^15 numbers, added up in float64, are right to about 1e-7 and several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 1 << 15
# Blocks that are converted at a time where a copy is needed (half precision, signs).
_CONVERTED_BLOCKS = 64


def inner_products(
    a: Float[Tensor, "K P"], b: Float[Tensor, "L P"], *, signs: bool = False
) -> Float[Tensor, "K L"]:
    """All inner products of the rows of `a` with the rows of `b`.

    Args:
        a: K flat vectors.
        b: L flat vectors.
        signs: Whether to take each number's sign first.

    Returns:
        The products, in float64 for float64 rows and in float32 for any narrower dtype.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
        >>> inner_products(a, a)
        tensor([[ 5., -6.],
                [-6.,  9.]])
        >>> inner_products(a, a, signs=True)
        tensor([[ 2., -1.],
                [-1.,  1.]])
    """
    result = torch.float64 if a.dtype == torch.float64 else torch.float32
    length = a.shape[-1]
    whole = length - length % BLOCK
    step = BLOCK * _CONVERTED_BLOCKS if signs or a.dtype != result else max(whole, 1)
    partial: list[Tensor] = []
    with exact_products(a.device):
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            left = _blocks(a[:, start:stop], result, signs)
            right = left if b is a else _blocks(b[:, start:stop], result, signs)
            partial.append(torch.bmm(left, right.transpose(1, 2)))
        if whole < length or not partial:
            left = _converted(a[:, whole:], result, signs)
            right = left if b is a else _converted(b[:, whole:], result, signs)
            partial.append((left @ right.T)[None])
    if len(partial) == 1 and len(partial[0]) == 1:
        return partial[0][0]
    # Apple's devices have no float64; everywhere else the sum over blocks is exact enough.
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return torch.cat(partial).sum(0, dtype=wide).to(result)


def gram(rows: Float[Tensor, "K P"], *, signs: bool = False) -> Float[Tensor, "K K"]:
    """The Gram matrix G = J·Jᵀ of the rows, right to about 1e-7 of its diagonal.

    Example:
        >>> gram(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([[ 18., -22.],
                [-22.,  38.]])
    """
    return inner_products(rows, rows, signs=signs)


def block_grams(
    rows: Float[Tensor, "K P"], segments: Sequence[tuple[int, int]], *, signs: bool = False
) -> Float[Tensor, "S K K"]:
    """One Gram matrix for each half-open range of columns in `segments`.

    Example:
        >>> block_grams(torch.tensor([[1.0, 2.0, 3.0]]), [(0, 2), (2, 3)])
        tensor([[[5.]],
        <BLANKLINE>
                [[9.]]])
    """
    return torch.stack([gram(rows[:, start:stop], signs=signs) for start, stop in segments])


def norm(vector: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """The Euclidean norm of a flat vector.

    Example:
        >>> norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    return inner_products(vector[None], vector[None])[0, 0].sqrt()


def cosines(gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K K"]:
    """The matrix of cosines that belongs to a Gram matrix; 0 beside a vector of length 0.

    Example:
        >>> cosines(torch.tensor([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))
        tensor([[1., 0., 1.],
                [0., 0., 0.],
                [1., 0., 1.]])
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = lengths[..., :, None] * lengths[..., None, :]
    # The denominator is made 1 where it is 0, so that no NaN arises and NaNs that come in stay.
    ratio = gram / torch.where(products == 0, torch.ones_like(products), products)
    return torch.where(products == 0, torch.zeros_like(ratio), ratio).clamp(-1, 1)


def _blocks(columns: Tensor, dtype: torch.dtype, signs: bool) -> Tensor:
    """[K, n·BLOCK] as [n, K, BLOCK]."""
    converted = _converted(columns, dtype, signs)
    return converted.reshape(len(columns), -1, BLOCK).transpose(0, 1)


def _converted(columns: Tensor, dtype: torch.dtype, signs: bool) -> Tensor:
    columns = columns.sign() if signs else columns
    return columns.to(dtype)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products at the precision of their inputs: no autocast, no TF32, no bfloat16."""
    enabled = torch.is_autocast_enabled(device.type)
    if not enabled and _full_precision():
        yield
        return
    with torch.autocast(device.type, enabled=False), _highest_precision():
        yield


def _full_precision() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the precision was set by backend, which this call cannot describe
        return False


@contextmanager
def _highest_precision() -> Iterator[None]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The newer, per-backend setting; a release that has no such attribute never gets here.
        backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009 # untyped
        precisions = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, precisions, strict=True):
                backend.fp32_precision = precision
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(old)
