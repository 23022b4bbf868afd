"""The engine that displaces the live weights and puts them back by copy.

It takes gradients by `backward`, so parameter hooks run and compiled modules work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.engines.session import Result
from gradkit.flat import Layout, Pool


class InplaceSession:
    """Displace by copy, `backward`, restore by copy.

    Adding a displacement and subtracting it again would change a few percent of the weights in
    their last bit, hence the copy.
    """

    def __init__(self, layout: Layout, pool: Pool, model: nn.Module | None) -> None:
        self._layout = layout
        self._pool = pool
        self._saved: Float[Tensor, " P"] | None = None
        self._buffers = [] if model is None else _Buffer.of(model)

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
                # From here on the weights can be put back, wherever an interrupt strikes.
                self._saved = saved
                for parameter, part in zip(parameters, self._layout.views(at), strict=True):
                    parameter.copy_(parameter + part)
            # Autocast keeps the weights it has cast, and would go on using the old ones.
            torch.clear_autocast_cache()
            yield parameters
        finally:
            self._restore_weights()

    def _restore_weights(self) -> None:
        if self._saved is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self._layout.parameters), self._layout.views(self._saved))
            self._saved = None
            torch.clear_autocast_cache()

    def run(self, body: Callable[[], Result], *, keep_buffers: bool) -> Result:  # noqa: D102
        if keep_buffers:
            return body()
        before = [buffer.snapshot() for buffer in self._buffers]
        try:
            return body()
        finally:
            for buffer in before:
                buffer.restore()

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
        self._restore_weights()
        for buffer in self._buffers:
            buffer.restore()


class _Buffer:
    """One buffer of a module, as an object and by value."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner = owner
        self._name = name
        self._object = owner._buffers[name]
        self._value = None if self._object is None else self._object.detach().clone()

    @classmethod
    def of(cls, model: nn.Module) -> list[_Buffer]:
        return [cls(module, name) for module in model.modules() for name in module._buffers]

    def snapshot(self) -> _Buffer:
        return _Buffer(self._owner, self._name)

    def restore(self) -> None:
        self._owner._buffers[self._name] = self._object
        if self._object is not None and self._value is not None:
            with torch.no_grad():
                if self._object.shape != self._value.shape:
                    self._object.resize_(self._value.shape)
                self._object.copy_(self._value)


def _take_grads(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads
