"""The engine that displaces the live weights and restores them.

It computes gradients by `backward`, so parameter hooks run and compiled modules work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.displacement import Displacement
from gradkit.core.flat import Layout, Pool, copy_all, is_only_held_by, memory_uses
from gradkit.core.ranks import is_expanded
from gradkit.engines.backward import (
    NO_CONTEXT,
    Receivers,
    backward,
    may_hand_on,
    take_grads,
)
from gradkit.engines.choice import ParameterPlaces, modules_of


class InplaceSession:
    """A session that displaces the weights in place and restores them.

    Subtracting the displacement again would change a few percent of the weights in their last bit.
    On a CPU the displaced weights are written to other memory, to which the parameters point for
    the time of the evaluation; that needs neither a copy nor a restoration of the weights. Where
    anything else in this process may refer to the weights' memory, they are displaced where they
    are and restored from a copy. Other processes that share the memory (`share_memory_`) do not see
    weights displaced, and their own steps meanwhile are kept.

    Args:
        layout: Where each parameter lies in the flat vector.
        pool: Memory for flat vectors.
        model: The model, if it is known.
        places: Where the parameters are in the model, if it is known.
    """

    def __init__(
        self,
        layout: Layout,
        pool: Pool,
        model: nn.Module | None,
        places: ParameterPlaces | None,
    ) -> None:
        writes_weights = places is not None and places.writes_weights
        self._others = [] if places is None else places.others
        self._layout = layout
        self._pool = pool
        self._saved: Float[Tensor, " P"] | None = None
        self._at_start = layout.flatten(layout.local_parameters()) if writes_weights else None
        if places is not None:
            self._modules = places.modules  # which were listed anew for this step
        else:
            self._modules = [] if model is None else modules_of(model)
        self._buffers = _BufferValues(self._modules)
        self._discarded: _BufferValues | None = None
        self._sharded_modules: list[Any] = (
            []
            if layout.shards is None
            else [module for module in self._modules if hasattr(module, "reshard")]
        )
        self._data = (
            [parameter.data for parameter in layout.parameters] if layout.shards is None else []
        )
        self._held = [
            (module._parameters, dict(module._parameters))
            for module in self._modules
            if not isinstance(module, torch.jit.ScriptModule)  # its parameters cannot be replaced
        ]

    def displaced(self, at: Displacement | None) -> AbstractContextManager[Sequence[Tensor]]:
        return nullcontext(self._layout.parameters) if at is None else self._displaced(at)

    @contextmanager
    def _displaced(self, at: Displacement) -> Iterator[Sequence[Tensor]]:
        parameters = self._layout.parameters
        rows, (views,) = self._pool.take(1)
        if self._may_exchange(views):
            with torch.no_grad():
                at.add_to(parameters, views)
            del at  # maybe the last reference; its memory is free now
            yield from self._exchanged(rows, views)
            return
        saved = rows[0]
        try:
            with torch.no_grad():
                values = self._layout.local_parameters()
                copy_all(views, values)
                self._saved = saved
                at.add_to(values, values)
                del at
            self._forget_copies()
            yield parameters
        finally:
            self._restore_weights(self._saved)
            self._saved = None

    def _may_exchange(self, views: Sequence[Tensor]) -> bool:
        """Whether parameters may point to other memory: nothing else refers to theirs."""
        if self._layout.device.type != "cpu" or self._layout.shards is not None:
            return False
        return all(
            type(parameter) in (Tensor, nn.Parameter)
            and parameter.data_ptr() == data.data_ptr()
            and parameter.dtype == view.dtype
            and parameter.stride() == view.stride()
            and is_only_held_by(2, data)  # the parameter and `_data`
            for parameter, data, view in zip(
                self._layout.parameters, self._data, views, strict=True
            )
        )

    def _exchanged(
        self, rows: Float[Tensor, "1 P"], views: Sequence[Tensor]
    ) -> Iterator[Sequence[Tensor]]:
        """Yield the parameters once, while they point to `views` of the memory of `rows`."""
        parameters, uses = self._layout.parameters, memory_uses(rows)
        try:
            for parameter, view in zip(parameters, views, strict=True):
                parameter.data = view
            self._forget_copies()
            self._count_write()
            yield parameters
        finally:
            for parameter, data in zip(parameters, self._data, strict=True):
                parameter.data = data
            if memory_uses(rows) != uses and not self._is_shared():
                # A closure has kept a view of the weights, which stays one of the live weights.
                with torch.no_grad():
                    copy_all(views, self._data)
                for parameter, view in zip(parameters, views, strict=True):
                    parameter.data = view
                self._data = [parameter.data for parameter in parameters]
            self._forget_copies()
            self._count_write()

    def _count_write(self) -> None:
        """Let autograd notice that the weights have changed, as after a write in place."""
        torch.autograd.graph.increment_version(self._layout.parameters)

    def _is_shared(self) -> bool:
        """Whether other processes may share memory of the weights."""
        return any(data.is_shared() for data in self._data)  # type: ignore[no-untyped-call]  # untyped in torch

    def _put_data_back(self) -> None:
        """Undo a closure's `parameter.data = ...`."""
        for parameter, data in zip(self._layout.parameters, self._data, strict=False):
            if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                parameter.data = data

    def _restore_weights(self, saved: Float[Tensor, " P"] | None) -> None:
        if saved is not None:
            self._put_data_back()
            with torch.no_grad():
                copy_all(self._layout.local_parameters(), self._layout.views(saved))
            self._forget_copies()

    def _forget_copies(self) -> None:
        """Drop copies of the weights that are now out of date."""
        # Autocast caches the weights that it has cast.
        torch.clear_autocast_cache()
        # A forward pass without a backward pass leaves sharded weights gathered.
        for module in self._sharded_modules:
            module.reshard()

    def running(self, *, keep_buffers: bool) -> AbstractContextManager[None]:
        return NO_CONTEXT if keep_buffers else self._discarding_buffers()

    @contextmanager
    def _discarding_buffers(self) -> Iterator[None]:
        self._discarded = _BufferValues(self._modules)
        try:
            yield
        finally:
            if self._discarded is not None:  # not rolled back meanwhile
                self._discarded.restore()
                self._discarded = None

    def differentiate(
        self,
        loss: Tensor,
        leaves: Sequence[Tensor],
        *,
        retain_graph: bool,
        receivers: Receivers,
    ) -> list[Tensor | None]:
        if self._layout.shards is None:
            # A closure may have frozen some leaves.
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            if receivers and not may_hand_on(self._modules, leaves):
                receivers = {}
            backward(loss, inputs, retain_graph=retain_graph, leaves=leaves, receivers=receivers)
            return take_grads(leaves)
        # The graph holds the gathered weights, and hooks reduce their gradients to the shards.
        grads = [other.grad for other in self._others]
        for other in self._others:
            other.grad = None
        try:
            torch.autograd.backward(loss, retain_graph=retain_graph)
            return take_grads(leaves)
        finally:
            for other, grad in zip(self._others, grads, strict=True):
                other.grad = grad

    def collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:
        has_gradient = any(leaf.grad is not None for leaf in leaves)
        return take_grads(leaves) if has_gradient else None

    def commit(self) -> None:
        """Do nothing, since the live buffers were changed directly."""

    def rollback(self) -> None:
        self._put_data_back()
        for held, objects in self._held:
            if any(held.get(key) is not value for key, value in objects.items()):
                held.clear()
                held.update(objects)
        self._restore_weights(self._at_start if self._at_start is not None else self._saved)
        self._saved = self._discarded = None
        self._buffers.restore()


class _BufferValues:
    """The buffers of some modules, both the objects and their values."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._held = [(module, dict(module._buffers.items())) for module in modules]
        self._values = [
            (buffer, buffer.detach().clone())
            for _, objects in self._held
            for buffer in objects.values()
            if buffer is not None and not is_expanded(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for module, objects in self._held:
            held = module._buffers
            if [*held.keys()] == [*objects] and all(held[key] is objects[key] for key in objects):
                continue
            if isinstance(module, torch.jit.ScriptModule):  # it has no dict that could be changed
                for key, buffer in objects.items():
                    setattr(module, key, buffer)
            else:
                held.clear()
                held.update(objects)
        for buffer, value in self._values:
            if buffer.dtype != value.dtype:
                buffer.data = value.clone()
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)
