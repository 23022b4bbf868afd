"""Parameters as one flat vector θ ∈ R^P, and memory for vectors of that length.

A `Layout` says where each trainable parameter lies in the flat vector. A `Pool` reuses `[K, P]`
buffers once nothing outside holds their memory.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradkit.core.ranks import Shards, local

Scope = Literal["global", "group", "tensor", "shared"]
SCOPES: tuple[Scope, ...] = ("global", "group", "tensor", "shared")

LARGE = 1 << 14
"""A parameter of at least so many elements counts as large; 64 KiB of float32."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each trainable parameter of an optimizer lies in the flat vector.

    Parameters keep the order of the optimizer's groups. Parameters that do not require a gradient
    have no place in the vector; if none requires one, the vector is empty. The vector has the
    widest dtype among its parameters, so that bfloat16 beside float32 loses nothing. Where
    parameters are sharded over ranks, the vector holds this rank's shards, one after the other.

    Attributes:
        parameters: The T parameters, each once.
        groups: The index of each parameter's group.
        offsets: T + 1 offsets; parameter t takes `offsets[t]:offsets[t + 1]`.
        shapes: Each parameter's shape, or its shard's where it is sharded.
        strides: Each parameter's strides where it is dense but not contiguous (channels-last,
            transposed), else None.
        dtypes: Each parameter's dtype.
        dtype: The vector's dtype.
        device: The device that all parameters are on.
        shards: How parameters are sharded over ranks; None if they are not.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> bias = torch.nn.Parameter(torch.zeros(2))
        >>> layout = Layout.of([{"params": [weight]}, {"params": [bias]}])
        >>> layout.numel, layout.segments("group")
        (8, ((0, 6), (6, 8)))
        >>> [view.shape for view in layout.views(torch.arange(8.0))]
        [torch.Size([2, 3]), torch.Size([2])]
    """

    parameters: tuple[Tensor, ...]
    groups: tuple[int, ...]
    offsets: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device
    shards: Shards | None = None

    @classmethod
    def of(cls, param_groups: Sequence[Mapping[str, Any]]) -> Layout:
        """The present layout of an optimizer's parameter groups.

        Raises:
            ValueError: If a parameter is complex, on the meta device or not yet initialised, if
                parameters are on more than one device, or if they are sharded in different ways.
        """
        parameters: list[Tensor] = []
        groups: list[int] = []
        offsets = [0]
        for index, group in enumerate(param_groups):
            for position, parameter in enumerate(group["params"]):
                if not parameter.requires_grad:
                    continue
                _check(parameter, f"parameter {position} of group {index}")
                parameters.append(parameter)
                groups.append(index)
                offsets.append(offsets[-1] + local(parameter).numel())
        if not parameters:
            frozen = next((p for group in param_groups for p in group["params"]), None)
            device = torch.device("cpu") if frozen is None else frozen.device
            return cls((), (), (0,), (), (), (), torch.float32, device)
        devices = {parameter.device for parameter in parameters}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"the optimizer's parameters are on several devices ({names}); "
                "a flat vector needs them on one"
            )
        dtype = parameters[0].dtype
        for other in {parameter.dtype for parameter in parameters}:
            dtype = torch.promote_types(dtype, other)
        parts = [local(parameter) for parameter in parameters]
        return cls(
            parameters=tuple(parameters),
            groups=tuple(groups),
            offsets=tuple(offsets),
            shapes=tuple(tuple(part.shape) for part in parts),
            strides=tuple(_dense_strides(part) for part in parts),
            dtypes=tuple(parameter.dtype for parameter in parameters),
            dtype=dtype,
            device=devices.pop(),
            shards=Shards.of(parameters),
        )

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.offsets)]

    @functools.cached_property
    def large(self) -> tuple[int, ...]:
        """The large parameters, which are worth one operation each."""
        return tuple(t for t, size in enumerate(self._sizes) if size >= LARGE)

    @functools.cached_property
    def small(self) -> frozenset[int]:
        """The other parameters."""
        return frozenset(range(len(self.parameters))).difference(self.large)

    def has(self, dtype: torch.dtype) -> bool:
        """Whether a parameter is of this dtype."""
        return any(parameter.dtype == dtype for parameter in self.parameters)

    @functools.cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """The parameters in batches: large ones alone, and small ones together.

        A batch takes one operation on a list. It has as many numbers as stay in the cache between
        two operations; on an accelerator, whose kernels take microseconds to launch, it has more.
        """
        most = LARGE if self.device.type == "cpu" else 256 * LARGE
        batches: list[list[int]] = []
        left = 0
        for t, (start, stop) in sorted(
            enumerate(pairwise(self.offsets)), key=lambda item: item[1][1] - item[1][0]
        ):
            if left < stop - start or not batches:
                batches.append([])
                left = most
            batches[-1].append(t)
            left -= stop - start
        return tuple(map(tuple, batches))

    @property
    def numel(self) -> int:
        """P, the length of the flat vector."""
        return self.offsets[-1]

    def zeros(self) -> Shaped[Tensor, " P"]:
        """A new flat vector of zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def fits(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these groups still have this layout; faster than making a new layout."""
        if self.shards is not None:
            return False
        position, count = 0, len(self.parameters)
        for index, group in enumerate(param_groups):
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                if (
                    position == count
                    or parameter is not self.parameters[position]
                    or parameter.shape != self.shapes[position]
                    or parameter.dtype != self.dtypes[position]
                    or parameter.device != self.device
                    or self.groups[position] != index
                    or not self._is_laid_out_as_before(position, parameter)
                ):
                    return False
                position += 1
        return position == count

    def _is_laid_out_as_before(self, position: int, parameter: Tensor) -> bool:
        strides = self.strides[position]
        if strides is not None:
            return parameter.stride() == strides
        return parameter.is_contiguous() or _dense_strides(parameter) is None

    def same_as(self, other: Layout) -> bool:
        """Whether both layouts place the same parameter objects in the same way."""
        return self is other or (
            len(self.parameters) == len(other.parameters)
            and all(a is b for a, b in zip(self.parameters, other.parameters, strict=True))
            and self.shapes == other.shapes
            and self.strides == other.strides
            and self.groups == other.groups
            and self.dtypes == other.dtypes
            and self.device == other.device
            and self.shards == other.shards
        )

    def local_parameters(self) -> list[Tensor]:
        """The parameters themselves, or this rank's shards of them.

        They are looked up each time, since shards move when a model is sharded or loaded.
        """
        if self.shards is None:
            return list(self.parameters)
        return [local(parameter) for parameter in self.parameters]

    def views(self, vector: Shaped[Tensor, " P"]) -> list[Tensor]:
        """The vector's parts, each with its parameter's shape and memory format."""
        # Views made by split() cannot be written to outside no_grad, and some become `.grad`.
        parts = torch.unsafe_split_with_sizes(vector, self._sizes)
        return list(map(_shaped, parts, self.shapes, self.strides))

    def segments(self, scope: Scope) -> tuple[tuple[int, int], ...]:
        """The half-open ranges of the flat vector that `scope` treats separately.

        Raises:
            ValueError: If `scope` is not "global", "group" or "tensor". ("shared" depends on the
                gradients; see `Gradients.shared`.)
        """
        if scope == "global":
            return ((0, self.numel),)
        if scope == "tensor":
            return tuple(pairwise(self.offsets))
        if scope == "group":
            ends = dict(zip(self.groups, self.offsets[1:], strict=True))
            return tuple(pairwise([0, *ends.values()]))
        raise ValueError(f"scope is {scope!r}; choose one of global, group, tensor")

    def flatten(self, tensors: Iterable[Tensor]) -> Shaped[Tensor, " P"]:
        """One new flat vector from tensors shaped (and sharded) as the parameters."""
        vector = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        copy_all(self.views(vector), [local(tensor) for tensor in tensors])
        return vector


def _shaped(part: Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Tensor:
    if strides is not None:
        return part.as_strided(shape, strides)
    return part if len(shape) == 1 else part.view(shape)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors to others; the lists may be empty."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def copy_parts(parts: Sequence[Tensor | None], views: Sequence[Tensor]) -> None:
    """Copy a vector's parts to the views of a flat vector; a part that is None is 0."""
    there = [t for t, part in enumerate(parts) if part is not None]
    if there:
        sources = [part for part in parts if part is not None]
        torch._foreach_copy_([views[t] for t in there], sources)
    missing = [view for view, part in zip(views, parts, strict=True) if part is None]
    if missing:
        torch._foreach_zero_(missing)


def _check(parameter: Tensor, what: str) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"{what} is not initialised yet; run one forward of the lazy module before wrapping"
        )
    if parameter.is_meta:
        raise ValueError(f"{what} is on the meta device; give it memory with to_empty() first")
    if parameter.is_complex():
        raise ValueError(
            f"{what} is complex ({parameter.dtype}); inner products are defined on real vectors: "
            "keep it as torch.view_as_real(...) and build the complex number in forward"
        )


def _dense_strides(parameter: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that is dense but not contiguous: channels-last, transposed.

    Autograd gives such a parameter a gradient of the same strides. Fused optimizers on the CPU read
    both in memory order and ignore strides.
    """
    if parameter.is_contiguous():
        return None
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size != 1 and stride != expected:
            return None
        expected *= size
    return tuple(parameter.stride())


_STEPS_KEPT = 10
"""For how many steps the pool keeps a single vector that no step uses."""


class Pool:
    """Buffers of K flat vectors, reused from step to step.

    Fresh allocations of millions of elements cost page faults, so buffers are kept. A buffer is
    reused only when no gradient, view or Python variable outside shares its memory, so that old
    gradients that are still referenced never change.

    Examples:
        >>> layout = Layout.of([{"params": [torch.nn.Parameter(torch.zeros(3))]}])
        >>> pool = Pool(layout)
        >>> first, _ = pool.take(2)
        >>> second, _ = pool.take(2)
        >>> first.data_ptr() == second.data_ptr()
        False
        >>> address = first.data_ptr()
        >>> del first
        >>> pool.take(2)[0].data_ptr() == address
        True
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._buffers: dict[int, list[_Buffer]] = {}
        # The most single vectors in use at an evaluation, in each of the last steps.
        self._in_use: deque[int] = deque([0], maxlen=_STEPS_KEPT)

    def take(self, count: int) -> tuple[Shaped[Tensor, "K P"], list[list[Tensor]]]:
        """An uninitialised `[count, P]` tensor, and each row's parameter-shaped views.

        The memory stays in use while the tensor, or a view of it made outside, exists.
        """
        buffer = self._free_buffer(count)
        return buffer.rows.view_as(buffer.rows), buffer.views

    def _free_buffer(self, count: int) -> _Buffer:
        buffers = self._buffers.setdefault(count, [])
        for buffer in buffers:
            if buffer.is_free():
                break
        else:
            buffer = _Buffer(self.layout, count)
            buffers.append(buffer)
        buffer.steps_idle = 0
        return buffer

    def take_vector(self) -> Shaped[Tensor, " P"]:
        """One uninitialised flat vector."""
        return self._free_buffer(1).rows[0]

    def note_use(self) -> None:
        """Note how many single vectors are in use; called when an evaluation begins.

        Memory for so many is needed at the peak, which evaluations are, and `trim` keeps it.
        """
        used = sum(not buffer.is_free() for buffer in self._buffers.get(1, ()))
        self._in_use[-1] = max(self._in_use[-1], used)

    def trim(self) -> None:
        """Free the buffers that the last steps did not use, or that the next step would not use.

        Called between steps. A single vector is kept for some steps, since a transform may need it
        in every k-th step only. If the last step's gradients are still referenced, they hold one
        buffer; a free buffer of the same size beside it would be one more than is needed.
        """
        for count, buffers in self._buffers.items():
            held: list[_Buffer] = []
            free: list[_Buffer] = []
            for buffer in sorted(buffers, key=lambda each: each.steps_idle):
                (free if buffer.is_free() else held).append(buffer)
            if count > 1:
                self._buffers[count] = [] if held else [b for b in free if b.steps_idle == 0]
            else:
                free = [buffer for buffer in free if buffer.steps_idle <= _STEPS_KEPT]
                room = max(self._in_use) - len(held) if held else len(free)
                last = [buffer for buffer in held if buffer.steps_idle == 0]
                self._buffers[count] = [*last, *free[: max(room, 0)]]
            for buffer in buffers:
                buffer.steps_idle += 1
        self._in_use.append(0)


class _Buffer:
    """A `[K, P]` tensor and the parameter-shaped views of its rows."""

    def __init__(self, layout: Layout, count: int) -> None:
        self.rows = torch.empty(count, layout.numel, dtype=layout.dtype, device=layout.device)
        self.steps_idle = 0
        self._layout = layout
        self._own_uses = memory_uses(self.rows)

    @functools.cached_property
    def views(self) -> list[list[Tensor]]:
        """Each row's parameter-shaped views, made on first use."""
        before = memory_uses(self.rows)
        views = [self._layout.views(row) for row in self.rows]
        after = memory_uses(self.rows)
        if self._own_uses is not None and before is not None and after is not None:
            self._own_uses += after - before
        return views

    def is_free(self) -> bool:
        return self._own_uses is not None and memory_uses(self.rows) == self._own_uses


# Not part of torch's public interface. Without this function no buffer counts as free, and each
# step allocates new ones: slower, with the same results.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def are_unshared(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the memory of these tensors is referenced by nothing except their list.

    False if that cannot be known. A view of a tensor that only the view references counts as
    unshared, since autograd returns the gradients of linear layers as such views.

    Examples:
        >>> are_unshared([torch.zeros(2), None, torch.zeros(2, 1).t()])
        True
        >>> vector = torch.zeros(2)
        >>> are_unshared([vector]), are_unshared([vector[:1]])
        (False, False)
    """
    if _ONE is None or any(count != _IN_A_LIST for count in _references(tensors)):
        return False
    return all(tensor is None or _has_own_memory(tensor) for tensor in tensors)


def is_held_once(holder: Sequence[object], index: int) -> bool:
    """Whether nothing else refers to an item of a list or tuple; False if that cannot be known.

    Examples:
        >>> item = [1.0]
        >>> is_held_once((item,), 0), is_held_once(([1.0],), 0)
        (False, True)
    """
    return sys.getrefcount(holder[index]) == _HELD_ONCE


def is_only_held_by(count: int, tensor: Tensor) -> bool:
    """Whether exactly so many tensors of this process, this one included, share its memory.

    False if that cannot be known. Other processes may share it, too.

    Examples:
        >>> vector = torch.zeros(2)
        >>> is_only_held_by(1, vector)
        True
        >>> view = vector[:1]
        >>> is_only_held_by(1, vector), is_only_held_by(2, view)
        (False, True)
    """
    return _ONE is not None and memory_uses(tensor) == _ONE + count - 1


def _has_own_memory(tensor: Tensor) -> bool:
    uses = memory_uses(tensor)
    if uses == _ONE:
        return True
    if _ONE is None or uses != _ONE + 1 or not tensor._is_view() or _ONE_VIEW is None:
        return False
    return _holders(tensor._base) == _ONE_VIEW


def _references(tensors: Sequence[Tensor | None]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors if tensor is not None]


def memory_uses(tensor: Tensor) -> int | None:
    """How many tensors share the storage of `tensor`; None if that cannot be known."""
    return None if _use_count is None else _use_count(tensor.untyped_storage()._cdata)


def _holders(tensor: Tensor | None) -> tuple[int, int] | None:
    """The number of references to a tensor: all, and those from Python."""
    count = getattr(tensor, "_use_count", None)
    return None if count is None else (count(), sys.getrefcount(tensor))


# The results of these functions for a tensor that only a list references, and for the base of a
# view that only the view references.
_IN_A_LIST = _references([torch.empty(1)])[0]
_ONE = memory_uses(torch.empty(1))
# Of an item that only a tuple refers to.
_HOLDER: Sequence[object] = ([1.0],)
_HELD_ONCE = sys.getrefcount(_HOLDER[0])
_VIEW = torch.empty(1, 1).t()
_ONE_VIEW = _holders(_VIEW._base)
