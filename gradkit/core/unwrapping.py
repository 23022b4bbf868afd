"""Modules and parameter names without the wrappers of torch.compile and DDP."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel` and `torch.compile`; other modules unchanged.

    Examples:
        >>> import torch
        >>> module = torch.nn.Linear(1, 1)
        >>> unwrapped(module) is module
        True
    """
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif _is_compiled(module):
            module = module._orig_mod  # type: ignore[assignment]  # torch.compile's own attribute
        else:
            return module


def _is_compiled(module: nn.Module) -> bool:
    # Not imported, which takes a second; without the import there can be no compiled module.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def plainly_named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters by the names that they have without wrappers.

    Examples:
        >>> import torch
        >>> module = torch.nn.Sequential(torch.nn.Linear(1, 1))
        >>> [name for name, _ in plainly_named(module)]
        ['0.weight', '0.bias']
    """
    for name, parameter in unwrapped(module).named_parameters():
        yield name.replace("_orig_mod.", ""), parameter  # parts that are compiled by themselves
