"""Small loops dominated by per-operation overhead.

numpy has several times less overhead per operation than torch, on the same memory. It also uses no
threads. For some operations torch does, from two thousand elements on, and then waits for threads
that a busy machine does not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def on_host(*tensors: Tensor) -> bool:
    """Whether numpy can work on the tensors: on a CPU, and not recorded by autograd."""
    return all(
        tensor.device.type == "cpu" and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def uploaded(values: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values from the host, copied to the device of `like`; the host does not wait for the device.

    Pageable memory is staged before the call returns, so that it may be freed at once. (A copy from
    a device to the host could be read too early.)

    Args:
        values: A tensor on the CPU, or on that device already.
        like: A tensor on the device.
        dtype: The dtype of the result; by default that of `like`.

    Examples:
        >>> uploaded(torch.arange(2), torch.zeros(1))
        tensor([0., 1.])
    """
    return values.to(like.device, dtype or like.dtype, non_blocking=values.device.type == "cpu")


@contextmanager
def numpy_or_torch(*tensors: Tensor) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Numpy and the tensors as arrays in the same memory, if possible; else torch and the tensors.

    As in torch, divisions by zero and NaNs give no warning.

    Examples:
        >>> numbers = torch.ones(2)
        >>> with numpy_or_torch(numbers) as (module, (array,)):
        ...     array += module.sqrt(array)
        >>> module.__name__, numbers
        ('numpy', tensor([2., 2.]))
    """
    if on_host(*tensors):
        with np.errstate(all="ignore"):
            yield np, tuple(tensor.detach().numpy() for tensor in tensors)
    else:
        yield torch, tensors


def rows_of(matrices: Any, rows: Any, out: Any) -> Any:
    """The rows of matrices [..., K, L] at these indices [N]: [..., N, L].

    In a loop, allocating and freeing memory can take longer than everything else, so numpy writes
    to `out`. torch has its own allocator.
    """
    if isinstance(matrices, Tensor):
        return matrices[..., rows, :]
    # No index is out of range; with mode="raise" numpy would allocate memory.
    return np.take(matrices, rows, axis=-2, out=out, mode="clip")


def products_of(a: Any, b: Any) -> Any:
    """The inner products of vectors [..., L], without allocating intermediate results."""
    return (a[..., None, :] @ b[..., None])[..., 0, 0]


def random_orders(count: int, generator: torch.Generator | None) -> Int[Tensor, "K K"]:
    """K random orders of K objectives, one per row, on the CPU.

    Args:
        count: K.
        generator: The generator to draw from.
    """
    uniform = torch.rand(count, count, generator=generator, device="cpu", dtype=torch.float32)
    return torch.from_numpy(uniform.numpy().argsort(axis=1, kind="stable"))
