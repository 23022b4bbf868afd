"""The engine that runs closures on other weights, without ever writing to the live ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from gradkit.engines.session import Result
from gradkit.flat import Layout, Pool


class FunctionalSession:
    """Closures and their gradients inside one `torch.func.functional_call`.

    The model's parameters are replaced by leaves at the wanted point and its buffers by clones.
    Every gradient is taken before the call returns: non-reentrant checkpointing runs the forward
    again during the backward pass, and must find the same weights then.
    """

    def __init__(self, layout: Layout, pool: Pool, model: nn.Module, names: Sequence[str]) -> None:
        self._layout = layout
        self._pool = pool
        self._runner = _Runner(model)
        self._names = [f"model.{name}" for name in names]
        self._live_buffers = dict(self._runner.named_buffers())
        self._kept_buffers: dict[str, Tensor] | None = None
        self._leaves: list[Tensor] = []

    @contextmanager
    def displaced(self, at: Float[Tensor, " P"] | None) -> Iterator[Sequence[Tensor]]:  # noqa: D102
        parameters = self._layout.parameters
        with torch.no_grad():
            if at is None:
                points = [parameter.detach() for parameter in parameters]
            else:
                values = self._layout.views(self._pool.take_vector())
                torch._foreach_copy_(values, list(parameters))
                torch._foreach_add_(values, self._layout.views(at))
                points = [
                    value if value.dtype == parameter.dtype else value.to(parameter.dtype)
                    for value, parameter in zip(values, parameters, strict=True)
                ]
        self._leaves = [point.requires_grad_() for point in points]
        torch.clear_autocast_cache()
        try:
            yield self._leaves
        finally:
            self._leaves = []

    def run(self, body: Callable[[], Result], *, keep_buffers: bool) -> Result:  # noqa: D102
        if keep_buffers and self._kept_buffers is not None:
            buffers = dict(self._kept_buffers)
        else:
            start = self._live_buffers if self._kept_buffers is None else self._kept_buffers
            buffers = {name: buffer.detach().clone() for name, buffer in start.items()}
        call: dict[str, Tensor] = {**buffers, **dict(zip(self._names, self._leaves, strict=True))}
        result: Result = functional_call(self._runner, call, (body,))
        if keep_buffers:
            # functional_call writes buffers that the model has replaced back to `call`.
            self._kept_buffers = {name: call[name] for name in buffers}
        return result

    def differentiate(  # noqa: D102
        self, loss: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool
    ) -> list[Tensor | None]:
        # The live parameters are asked for too: a graph that reaches one bypasses the leaves.
        grads = torch.autograd.grad(
            loss,
            [*leaves, *self._layout.parameters],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        self._refuse_live(grads[len(leaves) :])
        return list(grads[: len(leaves)])

    def collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:  # noqa: D102
        self._refuse_live([parameter.grad for parameter in self._layout.parameters])
        if all(leaf.grad is None for leaf in leaves):
            return None
        grads = [leaf.grad for leaf in leaves]
        self.zero_grad()
        return grads

    def zero_grad(self) -> None:
        """Drop the gradients that a closure's own backward has left so far."""
        for leaf in self._leaves:
            leaf.grad = None

    def _refuse_live(self, grads: Sequence[Tensor | None]) -> None:
        for name, grad in zip(self._names, grads, strict=True):
            if grad is not None:
                name = name.removeprefix("model.")
                raise RuntimeError(
                    f"the loss depends on the parameter {name!r} by way of a reference made "
                    "outside the closure (a cached parameter list, say), which does not see "
                    "displaced weights; look the parameter up in the model inside the closure, "
                    "or pass engine='inplace' to gk.wrap()"
                )

    def commit(self) -> None:  # noqa: D102
        if not self._kept_buffers:
            return
        # All are copied: BatchNorm's kernel writes its statistics without leaving a trace in the
        # tensors' version counters.
        same = {
            name: buffer
            for name, buffer in self._kept_buffers.items()
            if (buffer.shape, buffer.dtype)
            == (self._live_buffers[name].shape, self._live_buffers[name].dtype)
        }
        with torch.no_grad():
            torch._foreach_copy_([self._live_buffers[name] for name in same], [*same.values()])
        for name in self._kept_buffers.keys() - same.keys():
            owner, _, key = name.rpartition(".")
            self._runner.get_submodule(owner)._buffers[key] = self._kept_buffers[name].detach()

    def rollback(self) -> None:
        """Nothing to do: weights and buffers were never written."""


class _Runner(nn.Module):
    """Holds the model, so that `functional_call` puts its tensors in place, and runs anything."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, body: Callable[[], Result]) -> Result:
        return body()
