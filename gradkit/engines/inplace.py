"""The engine that displaces the live weights and puts them back by copy.

It takes gradients by `backward`, so parameter hooks run and compiled modules work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.engines.session import Result, is_expanded
from gradkit.flat import Layout, Pool


class InplaceSession:
    """Displace by copy, `backward`, restore by copy.

    Adding a displacement and subtracting it again would change a few percent of the weights in
    their last bit, hence the copy.
    """

    def __init__(
        self, layout: Layout, pool: Pool, model: nn.Module | None, *, writes_weights: bool
    ) -> None:
        """Begin a step; `writes_weights` says that the model's forward changes its weights."""
        self._layout = layout
        self._pool = pool
        self._saved: Float[Tensor, " P"] | None = None
        self._at_start = layout.flatten(layout.parameters) if writes_weights else None
        self._modules = [] if model is None else list(model.modules())
        self._buffers = _BufferValues(self._modules)

    @contextmanager
    def displaced(self, at: Float[Tensor, " P"] | None) -> Iterator[Sequence[Tensor]]:  # noqa: D102
        parameters = self._layout.parameters
        if at is None:
            yield parameters
            return
        saved = self._pool.take_vector()
        try:
            with torch.no_grad():
                torch._foreach_copy_(self._layout.views(saved), list(parameters))
                self._saved = saved
                for parameter, part in zip(parameters, self._layout.views(at), strict=True):
                    parameter.add_(part)
                del at, part  # not needed any more, and maybe the last references
            # Autocast keeps the weights it has cast, and would go on using the old ones.
            torch.clear_autocast_cache()
            yield parameters
        finally:
            self._restore_weights(self._saved)
            self._saved = None

    def _restore_weights(self, saved: Float[Tensor, " P"] | None) -> None:
        if saved is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self._layout.parameters), self._layout.views(saved))
            torch.clear_autocast_cache()

    def run(self, body: Callable[[], Result], *, keep_buffers: bool) -> Result:  # noqa: D102
        if keep_buffers:
            return body()
        before = _BufferValues(self._modules)
        try:
            return body()
        finally:
            before.restore()

    def differentiate(  # noqa: D102
        self, loss: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool
    ) -> list[Tensor | None]:
        torch.autograd.backward(loss, inputs=list(leaves), retain_graph=retain_graph)
        return _take_grads(leaves)

    def collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:  # noqa: D102
        if all(leaf.grad is None for leaf in leaves):
            return None
        return _take_grads(leaves)

    def commit(self) -> None:
        """Nothing to do: kept changes were made to the live buffers."""

    def rollback(self) -> None:  # noqa: D102
        self._restore_weights(self._at_start if self._at_start is not None else self._saved)
        self._saved = None
        self._buffers.restore()


class _BufferValues:
    """The buffers of some modules, as objects and by value."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._held = [(module._buffers, dict(module._buffers)) for module in modules]
        self._values = [
            (buffer, buffer.detach().clone())
            for _, objects in self._held
            for buffer in objects.values()
            if buffer is not None and not is_expanded(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for held, objects in self._held:
            if [*held] != [*objects] or any(held[key] is not objects[key] for key in objects):
                held.clear()
                held.update(objects)
        for buffer, value in self._values:
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)


def _take_grads(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads
