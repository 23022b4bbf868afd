"""Calls of a model on several inputs at once, each as if it were alone.

`torch.vmap` runs a function on a stack of inputs. A layer that mixes the images of a batch, such as
BatchNorm with the batch's statistics, then mixes those of one input only, which one larger batch
would not do. It cannot run everything: a branch on a tensor's value, `.item()`, random numbers and
boolean masks raise a RuntimeError.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


def vectorised(function: Callable[..., Any], *inputs: Any) -> Any:
    """The results of `function` for each entry of the stacked inputs, stacked.

    Gradients flow through, also to inputs that differ by entry. Operations that `torch.vmap` cannot
    batch run one by one, without its warning.

    Args:
        function: Takes one entry of each input and returns a tensor, or a tuple or dict of tensors.
        *inputs: Tensors [entries, ...], or tuples or dicts of such.

    Raises:
        RuntimeError: If `torch.vmap` cannot run the function.
        ValueError: If the function returns something else than tensors.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
        >>> vectorised(lambda entry: entry - entry.mean(), x)
        tensor([[ -1.,   1.],
                [-10.,  10.]])
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    # Transformer layers take a kernel without derivative where no input has requires_grad, which
    # torch.vmap hides.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.vmap(function)(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def in_autocast(device: torch.device) -> bool:
    """Whether `torch.autocast` is on for a device, which `torch.vmap` would silently leave out.

    Examples:
        >>> in_autocast(torch.device("cpu"))
        False
    """
    return torch.is_autocast_enabled(device.type)
