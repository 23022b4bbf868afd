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


def modules_by_path(module: nn.Module) -> dict[str, nn.Module]:
    """A module and all modules inside it by path, one that is registered twice under both paths.

    As `named_modules(remove_duplicate=False)`, which passes each module through as many generators
    as it is deep.

    Examples:
        >>> layer = nn.ReLU()
        >>> [*modules_by_path(nn.Sequential(layer, nn.Sequential(layer)))]
        ['', '0', '1', '1.0']
    """
    found: dict[str, nn.Module] = {}
    ahead = [("", module)]
    while ahead:
        path, each = ahead.pop()
        found[path] = each
        prefix = f"{path}." if path else ""
        children = reversed(each._modules.items())
        ahead += [(prefix + name, child) for name, child in children if child is not None]
    return found


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
