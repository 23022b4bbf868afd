"""Making a teacher from a student, and checking that it fits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradkit.core.ranks import is_expanded, is_sharded
from gradkit.core.unwrapping import unwrapped


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A frozen copy of a module, without gradients.

    Computed tensors that a module keeps as attributes are copied without their graph: the weight of
    `torch.nn.utils.prune` and of the older `weight_norm` and `spectral_norm`, which a hook computes
    in each forward pass.

    Args:
        module: The module to copy.
        memo: Objects to use instead of copies, by the id of the original; see `copy.deepcopy`.

    Raises:
        ValueError: If it cannot be copied; a teacher must then be passed.
    """
    memo = {} if memo is None else memo
    given = set(map(id, memo.values()))
    for each in module.modules():
        for tensor in _results(list(vars(each).values())):
            memo[id(tensor)] = tensor.detach().clone()
    try:
        made = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"the student, a {type(module).__name__}, cannot be copied ({error}); make a second "
            "module in the same way, load the student's weights into it, as in "
            "teacher.load_state_dict(student.state_dict()), and pass it as teacher="
        ) from error
    for parameter in made.parameters():
        if id(parameter) in given:
            continue
        parameter.requires_grad_(False)
        parameter.grad = None
        if not is_writable(parameter):
            parameter.data = parameter.detach().clone()
    _share_memory_alike(module, made)
    return made


def _share_memory_alike(module: nn.Module, made: nn.Module) -> None:
    """Make a copy's buffers views of its weights, where they are in the original."""
    weights = {
        _storage(each): (name, each) for name, each in module.named_parameters() if _storage(each)
    }
    for path, each in module.named_modules(remove_duplicate=False):
        for key, buffer in each._buffers.items():
            name, weight = weights.get(None if buffer is None else _storage(buffer), (None, None))
            if buffer is None or name is None or weight is None or buffer.dtype != weight.dtype:
                continue
            own = made.get_parameter(name).detach()
            offset = own.storage_offset() + buffer.storage_offset() - weight.storage_offset()
            steps = zip(buffer.shape, buffer.stride(), strict=True)
            end = offset + sum((size - 1) * step for size, step in steps) + 1
            lies_within = offset >= 0 and end * own.itemsize <= own.untyped_storage().nbytes()
            if own.stride() == weight.stride() and lies_within:
                shown = own.as_strided(buffer.shape, buffer.stride(), offset)
                made.get_submodule(path)._buffers[key] = shown


def _storage(tensor: Tensor) -> int | None:
    """The address of a plain tensor's storage; None if it has none."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage().data_ptr() or None


def _results(values: list[Any]) -> Iterator[Tensor]:
    """The tensors with a graph among these values, including those in lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _results(list(value))
        elif isinstance(value, dict):
            yield from _results(list(value.values()))


def is_writable(tensor: Tensor) -> bool:
    """Whether the elements of a tensor can be written in place."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return dense and not tensor.is_inference() and not is_expanded(tensor)


def make_teacher(student: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """A copy of the student, or the teacher that was passed, after a check that it fits.

    Raises:
        TypeError: If student or teacher is not a module.
        ValueError: If the student is not initialised yet or cannot be copied, or if the teacher
            does not fit.
    """
    for name, module in (("student", student), ("teacher", teacher)):
        if not isinstance(module, nn.Module) and (name == "student" or module is not None):
            raise TypeError(f"{name} is a {type(module).__name__}; pass a torch.nn.Module")
    inner = unwrapped(student)
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"the student's {name!r} is not initialised yet; run one forward of the lazy "
                "module before making a teacher"
            )
    if teacher is None:
        if any(map(is_sharded, inner.parameters())):
            raise ValueError(
                "the student is sharded and cannot be copied; make a second module with the same "
                "weights, call fully_shard() on it in the same way, and pass it as teacher="
            )
        return copied(inner)
    if unwrapped(teacher) is inner:
        raise ValueError("teacher and student are the same module; pass a copy, or teacher=None")
    mine, theirs = _outline(unwrapped(teacher)), _outline(inner)
    different = sorted(
        name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
    )
    if different:
        raise ValueError(
            f"teacher and student differ in {different[0]!r}: it has "
            f"{mine.get(different[0], 'no place (absent)')} in the teacher and "
            f"{theirs.get(different[0], 'no place (absent)')} in the student; use two copies of "
            "one architecture"
        )
    return teacher


def _outline(module: nn.Module) -> dict[str, str]:
    """A description of each parameter and of each buffer that is saved, by name."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {
        **{name: f"shape {tuple(each.shape)}" for name, each in parameters},
        **{name: "the place of a buffer" for name, _ in saved_buffers(module)},
    }


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are saved in a state dict, by name."""
    for path, each in module.named_modules(remove_duplicate=False):
        for key, buffer in each._buffers.items():
            if buffer is not None and key not in each._non_persistent_buffers_set:
                yield joined(path, key), buffer


def joined(path: str, key: str) -> str:
    """A tensor's qualified name, from its module's path and its own key."""
    return f"{path}.{key}" if path else key
