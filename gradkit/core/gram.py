"""Inner products of flat vectors: Gram matrices, norms, cosines.

All inner products of the library use one blocked reduction. On a CPU, a plain float32 product of
vectors of tens of millions of elements is wrong in the third digit. Here float32 products of short
blocks are summed in float64: the relative error is at most 1e-6, and it is several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.ranks import Shards

BLOCK = 1 << 9
# torch's norm has a fast path, which shorter blocks would not take.
_NORM_BLOCK = 640
# Vectors up to this length are converted to float64 as a whole.
_SHORT = 1 << 12
# Block products that are held at a time. With many rows, all of them would need more memory than
# the rows.
_PRODUCTS = 1 << 20
# Columns that are converted at a time where a copy is needed.
_CONVERTED_COLUMNS = 1 << 18
_CONVERTED_ELEMENTS = 1 << 22
# Elements that are processed at a time. On a CPU, intermediate results then stay in the cache; on
# an accelerator, a kernel then takes longer to run than to launch.
_ELEMENTS = 1 << 17
_ELEMENTS_ON_ACCELERATOR = 1 << 24
# Signs that are held at a time on a CPU. Their sums are exact below 2²⁴.
_SIGNS = 1 << 19
# Columns of two rows whose signs are counted at a time.
_PAIR = 1 << 18
# Squares outside this range may have overflowed in float32, or lost digits to underflow.
_TRUSTED = (1e-28, 1e36)
# So few numbers are compared faster in Python.
_FEW = 64


def inner_products(
    a: Float[Tensor, "K P"],
    b: Float[Tensor, "L P"],
    *,
    signs: bool = False,
    over: Shards | None = None,
) -> Float[Tensor, "K L"]:
    """All inner products of the rows of `a` with the rows of `b`, in float64.

    On Apple's devices, which have no float64, they are in float32.

    Args:
        a: K flat vectors.
        b: L flat vectors.
        signs: Whether to replace each element by its sign first.
        over: The ranks that hold the other shards of these vectors; None if there are none.

    Examples:
        >>> a = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
        >>> inner_products(a, a)
        tensor([[ 5., -6.],
                [-6.,  9.]], dtype=torch.float64)
        >>> inner_products(a, a, signs=True)
        tensor([[ 2., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    products = _local_products(a, b, signs)
    return products if over is None else over.add_up(products)


def _local_products(
    a: Float[Tensor, "K P"], b: Float[Tensor, "L P"], signs: bool
) -> Float[Tensor, "K L"]:
    if not signs and a.device.type == "cpu" and a.dtype != torch.float64:
        if a.shape[1] <= _SHORT:
            wide = a.double()
            return torch.mm(wide, (wide if b is a else b.double()).T)
        if b is a and len(a) == 1 and a.dtype == torch.float32:
            square = squared_norm([a[0]])
            if square is not None:
                return square.reshape(1, 1)
    if signs and a.device.type == "cpu":
        pair = b is a and len(a) == 2 and a.dtype in (torch.float32, torch.float64)
        return _sign_products_of_pair(a) if pair else _sign_products(a, b)
    products = _products(a, b, signs, None)
    if a.device.type != "cpu" or a.dtype == torch.float64:
        return products
    # On the CPU, checking the result needs no synchronisation.
    if _in_range(products.diagonal() if b is a else products.flatten()):
        return products
    scales = (_magnitudes(a), _magnitudes(b))
    scaled = _products(a, b, signs, scales)
    return scaled * scales[0][:, None].double() * scales[1].double()


def squared_norm(parts: Sequence[Tensor]) -> Float[Tensor, ""] | None:
    """The squared norm, in float64, of a vector given in parts, on a CPU or CUDA device.

    None if float32 on a CPU may have overflowed or lost digits, so that the vector must be scaled,
    or if there are no parts.

    Examples:
        >>> squared_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(25., dtype=torch.float64)
    """
    if not parts:
        return None
    if parts[0].device.type == "cuda":  # in pieces, whose conversion needs little memory
        pieces = [
            piece for part in parts for piece in torch.split(part.reshape(-1), _CONVERTED_ELEMENTS)
        ]
        return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)).square().sum()
    norms, rest = [], []
    for part in parts:
        vector, length = part.reshape(-1), part.numel()
        if length > _SHORT:
            whole = length - length % _NORM_BLOCK
            blocks = vector[:whole].view(-1, _NORM_BLOCK)
            dtype = torch.promote_types(part.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(blocks, dim=1, dtype=dtype))
            vector = vector[whole:]
        rest.append(vector)
    wide = torch.cat([*norms, *rest]).double()
    total = torch.dot(wide, wide)
    return total if not norms or _in_range(total) else None


def product_of_parts(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""] | None:
    """The inner product, in float64, of two vectors given in parts, on a CPU.

    None if float32 may have overflowed or lost digits; the vectors must then be scaled.

    Args:
        a: A vector in parts.
        b: Another one, whose parts have the same shapes.

    Examples:
        >>> product_of_parts([torch.ones(1), torch.ones(1, 2)], [torch.ones(1), -torch.ones(1, 2)])
        tensor(-1., dtype=torch.float64)
    """
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    rest: tuple[list[Tensor], list[Tensor]] = [], []
    with exact_products(torch.device("cpu")):
        for pair in zip(a, b, strict=True):
            dtype = at_least_single(torch.promote_types(pair[0].dtype, pair[1].dtype))
            u, v = (part.reshape(-1) for part in pair)
            whole = len(u) - len(u) % BLOCK if len(u) > _SHORT else 0
            if whole:
                # With other strides of the same blocks, bmm takes six times as long.
                left, right = (_blocks(vector[None, :whole].to(dtype)) for vector in (u, v))
                total += torch.bmm(left, right.transpose(1, 2)).sum(dtype=torch.float64)
            for held, vector in zip(rest, (u, v), strict=True):
                held.append(vector[whole:])
    if rest[0]:
        u, v = (torch.cat(held).double() for held in rest)
        total += u @ v
    return total if _in_range(total) else None


def block_width(count: int, device: torch.device) -> int:
    """The number of columns to process at a time, given the number of rows."""
    numbers = _ELEMENTS if device.type == "cpu" else _ELEMENTS_ON_ACCELERATOR
    return max(numbers // max(count, 1), 1)


def block_spans(start: int, stop: int, width: int) -> list[tuple[int, int]]:
    """The half-open blocks of a range.

    Examples:
        >>> block_spans(0, 5, 2)
        [(0, 2), (2, 4), (4, 5)]
    """
    return [(first, min(first + width, stop)) for first in range(start, stop, width)]


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: this dtype, or float32 if it is narrower."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def accumulator(device: torch.device) -> torch.dtype:
    """The dtype of inner products and of everything computed from them."""
    return torch.float32 if device.type == "mps" else torch.float64


def _in_range(products: Tensor) -> bool:
    """Whether all products are far from overflow and underflow in float32."""
    least, most = _TRUSTED
    if products.numel() <= _FEW:
        return all(least < abs(product) < most for product in products.flatten().tolist())
    return bool(((products.abs() > least) & (products.abs() < most)).all())


def _sign_products(a: Float[Tensor, "K P"], b: Float[Tensor, "L P"]) -> Float[Tensor, "K L"]:
    """The inner products of the rows' signs, on a CPU, which are exact.

    Each element is read once from memory: its sign goes to a buffer that stays in the cache.
    """
    count = len(a) + (b is not a) * len(b)
    width = max(_SIGNS // count, BLOCK)
    buffer = torch.empty(count, min(width, a.shape[1]), device="cpu")
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device="cpu")
    with exact_products(a.device):
        for start, stop in block_spans(0, a.shape[1], width):
            left, right, columns = a[:, start:stop], b[:, start:stop], stop - start
            x = _signs(left, buffer[: len(a), :columns])
            y = x if b is a else _signs(right, buffer[len(a) :, :columns])
            for column, row in enumerate(y):
                rows = column + 1 if b is a else len(x)
                total[:rows, column] += torch.mv(x[:rows], row)
    return total + total.triu(1).T if b is a else total


def _sign_products_of_pair(rows: Float[Tensor, "2 P"]) -> Float[Tensor, "2 2"]:
    """The inner products of two rows' signs, on a CPU, which are exact.

    Where every product of two elements is positive or negative, no element is 0, and the products
    have the signs sought. This reads each element once and takes two thirds of the time of
    `_sign_products`. A product may also be 0 by underflow, or NaN. Blocks in which one is, and
    those that follow until the next without a 0, are counted element by element.
    """
    pair = rows.detach().numpy()
    length = pair.shape[1]
    width = min(_PAIR, length)
    products, masks = np.empty(width, pair.dtype), np.empty((4, width), bool)
    own = other = agreement = 0
    plain = True
    with np.errstate(all="ignore"):
        for start, stop in block_spans(0, length, _PAIR):
            block, columns = pair[:, start:stop], stop - start
            if plain:
                product = np.multiply(block[0], block[1], out=products[:columns])
                positive = int(np.count_nonzero(np.greater(product, 0, out=masks[0, :columns])))
                negative = int(np.count_nonzero(np.less(product, 0, out=masks[0, :columns])))
                counts = (columns, columns, positive - negative)
                plain = positive + negative == columns
            if not plain:
                counts = _count_signs(block, masks[:, :columns])
                plain = counts[:2] == (columns, columns)
            own, other, agreement = own + counts[0], other + counts[1], agreement + counts[2]
    found = [[own, agreement], [agreement, other]]
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _count_signs(
    block: npt.NDArray[np.floating[Any]], masks: npt.NDArray[np.bool_]
) -> tuple[int, int, int]:
    """How many elements of each of two rows are not 0, and the inner product of their signs."""
    positive, counted = masks[:2], masks[2:]
    np.greater(block, 0, out=positive)
    np.logical_or(np.less(block, 0, out=counted), positive, out=counted)
    own, other = (int(np.count_nonzero(row)) for row in counted)
    differ = np.logical_xor(positive[0], positive[1], out=positive[0])
    shared = np.logical_and(counted[0], counted[1], out=counted[0])
    apart = np.count_nonzero(np.logical_and(differ, shared, out=differ))
    return own, other, int(np.count_nonzero(shared)) - 2 * int(apart)


def _signs(columns: Tensor, out: Float[Tensor, "K n"]) -> Float[Tensor, "K n"]:
    if columns.dtype == out.dtype:
        return torch.sign(columns, out=out)
    # Only float64 has numbers that would be 0 in float32.
    return out.copy_(columns.sign() if columns.dtype == torch.float64 else columns).sign_()


def _products(
    a: Tensor, b: Tensor, signs: bool, scales: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "K L"]:
    wide = accumulator(a.device)
    # Float64 is slow on a CPU. On an accelerator it costs nothing, since memory is the limit.
    exact = signs or (a.device.type == "cpu" and a.dtype != torch.float64)
    inside = torch.float32 if exact else wide
    copies = signs or scales is not None or a.dtype != inside
    length = a.shape[-1]
    whole = length - length % BLOCK
    step = max(_PRODUCTS // max(len(a) * len(b), 1), 1) * BLOCK
    if copies:
        # On an accelerator pieces are larger, since launching a kernel takes longer than reading a
        # small piece. With pieces twice as large, peak memory was one float32 vector higher.
        room = 0 if a.device.type == "cpu" else length // (4 * (len(a) + (b is not a) * len(b)))
        step = min(step, max(_CONVERTED_COLUMNS, room - room % BLOCK))

    def converted(rows: Tensor, start: int, stop: int, side: int) -> Tensor:
        columns = rows[:, start:stop]
        if signs:
            columns = columns.sign()
        columns = columns.to(inside)
        return columns if scales is None else columns / scales[side][:, None]

    total = torch.zeros(len(a), len(b), dtype=wide, device=a.device)
    with exact_products(a.device):
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            left = _blocks(converted(a, start, stop, 0))
            right = left if b is a else _blocks(converted(b, start, stop, 1))
            total += torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=wide)
        if whole < length:
            left = converted(a, whole, length, 0)
            right = left if b is a else converted(b, whole, length, 1)
            total += left @ right.T
    return total


def _magnitudes(rows: Float[Tensor, "K P"]) -> Float[Tensor, " K"]:
    """A power of two near the largest magnitude of each row; 1 for a row of zeros."""
    if rows.shape[1] == 0:
        return torch.ones(len(rows), device=rows.device)
    largest = torch.stack([torch.linalg.vector_norm(row, torch.inf) for row in rows]).float()
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, largest, torch.ones_like(largest)).log2().floor().exp2()


def _blocks(columns: Float[Tensor, "K n"]) -> Float[Tensor, "blocks K block"]:
    return columns.reshape(len(columns), -1, BLOCK).transpose(0, 1)


def gram(
    rows: Float[Tensor, "K P"], *, signs: bool = False, over: Shards | None = None
) -> Float[Tensor, "K K"]:
    """The Gram matrix G = J·Jᵀ of the rows; the error is at most 1e-6 of its diagonal.

    Examples:
        >>> gram(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([[ 18., -22.],
                [-22.,  38.]], dtype=torch.float64)
    """
    return inner_products(rows, rows, signs=signs, over=over)


def block_grams(
    rows: Float[Tensor, "K P"],
    segments: Sequence[tuple[int, int]],
    *,
    signs: bool = False,
    over: Shards | None = None,
) -> Float[Tensor, "S K K"]:
    """One Gram matrix for each half-open range of columns in `segments`.

    Examples:
        >>> block_grams(torch.tensor([[1.0, 2.0, 3.0]]), [(0, 2), (2, 3)])
        tensor([[[5.]],
        <BLANKLINE>
                [[9.]]], dtype=torch.float64)
    """
    grams = torch.stack([gram(rows[:, start:stop], signs=signs) for start, stop in segments])
    return grams if over is None else over.add_up(grams)


def norm(vector: Float[Tensor, " P"], *, over: Shards | None = None) -> Float[Tensor, ""]:
    """The Euclidean norm of a flat vector.

    Examples:
        >>> norm(torch.tensor([3.0, 4.0]))
        tensor(5., dtype=torch.float64)
    """
    return gram(vector[None], over=over)[0, 0].sqrt()


def cosines(gram: Float[Tensor, "*batch K K"]) -> Float[Tensor, "*batch K K"]:
    """The matrix of cosines of a Gram matrix; 0 in the rows and columns of zero vectors.

    Examples:
        >>> cosines(torch.tensor([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))
        tensor([[1., 0., 1.],
                [0., 0., 0.],
                [1., 0., 1.]])
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    # The denominator 0 is replaced by 1, so that no new NaN appears; NaNs of the input remain.
    ratio = gram / torch.where(products == 0, torch.ones_like(products), products)
    return torch.where(products == 0, torch.zeros_like(ratio), ratio).clamp(-1, 1)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products at the precision of their inputs: no autocast, TF32 or bfloat16."""
    enabled = torch.is_autocast_enabled(device.type)
    if not enabled and _full_precision():
        yield
        return
    with torch.autocast(device.type, enabled=False), _highest_precision():
        yield


def _full_precision() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the precision was set per backend, which this call does not support
        return False


@contextmanager
def _highest_precision() -> Iterator[None]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The newer setting per backend; releases without the attribute never get here.
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
