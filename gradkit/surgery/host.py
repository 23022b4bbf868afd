"""Many small operations in turn, where it is starting them that costs.

numpy starts an operation several times faster than torch, on the same memory. Nor does it share the
work among threads: torch does from two thousand numbers on in some operations, and then waits for
threads that a busy machine does not run.
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
    """Whether numpy can work on the tensors: on a CPU, and of no interest to autograd."""
    return all(
        tensor.device.type == "cpu" and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


def uploaded(values: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values from the host, on the device of `like`; the host does not wait for the device.

    Ordinary memory is copied aside before the call returns, so that it may be freed at once. (The
    other way, from a device, such a copy would be read too early.)

    Args:
        values: On the CPU, or on that device already.
        like: A tensor on the device.
        dtype: By default that of `like`.

    Examples:
        >>> uploaded(torch.arange(2), torch.zeros(1))
        tensor([0., 1.])
    """
    return values.to(like.device, dtype or like.dtype, non_blocking=values.device.type == "cpu")


@contextmanager
def numpy_or_torch(*tensors: Tensor) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The tensors as arrays in the same memory, and numpy, where that can be; otherwise torch.

    Like torch, numpy gives no warning of a division by zero or of NaN here.

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
    """Rows of matrices [..., K, L], given by their numbers [N]: [..., N, L].

    In a loop, memory that is asked for and given back each time can take longer than all else, so
    numpy writes to `out`; torch has an allocator of its own.
    """
    if isinstance(matrices, Tensor):
        return matrices[..., rows, :]
    # No number lies outside; with mode="raise" numpy would ask for memory after all.
    return np.take(matrices, rows, axis=-2, out=out, mode="clip")


def products_of(a: Any, b: Any) -> Any:
    """The inner products of vectors [..., L], by an operation that asks for no memory beside."""
    return (a[..., None, :] @ b[..., None])[..., 0, 0]


def random_orders(count: int, generator: torch.Generator | None) -> Int[Tensor, "K K"]:
    """K random orders of K objectives, one a row, on the CPU.

    Args:
        count: K.
        generator: Where random numbers are drawn from.
    """
    uniform = torch.rand(count, count, generator=generator, device="cpu", dtype=torch.float32)
    return torch.from_numpy(uniform.numpy().argsort(axis=1, kind="stable"))
