"""The engine that runs closures on other weights and never writes to the live ones."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.core.displacement import Displacement
from gradkit.core.flat import Layout, Pool
from gradkit.core.ranks import is_expanded
from gradkit.engines.backward import Receivers, backward, take_grads
from gradkit.engines.choice import ParameterPlaces
from gradkit.engines.objectives import OVER, NoGradientError

Buffers = list[dict[str, Tensor | None]]


class FunctionalSession:
    """A session that replaces the model's parameters by leaves and its buffers by clones.

    While a closure runs, the model's parameters are leaves at the wanted point and its buffers are
    clones. Every gradient is computed before the originals are restored, since non-reentrant
    checkpointing runs the forward again during the backward pass and needs the same weights.

    `torch.func.functional_call` does the same for one call. Here it works for any code that uses
    the model, a module that is registered under two names gets its own parameters back, and
    `rollback` can restore them after an error. The optimizer's groups hold the leaves, too, since
    trainers clip, log and clear the gradients there.

    Args:
        layout: Where each parameter lies in the flat vector.
        pool: Memory for flat vectors.
        places: Where the parameters are in the model.
        base: The wrapped optimizer.
    """

    def __init__(
        self,
        layout: Layout,
        pool: Pool,
        places: ParameterPlaces,
        base: torch.optim.Optimizer,
    ) -> None:
        self._places = places
        self._layout = layout
        self._pool = pool
        self._modules = places.modules
        self._live_buffers: Buffers = [dict(module._buffers) for module in self._modules]
        self._kept_buffers: Buffers | None = None
        index = {id(parameter): t for t, parameter in enumerate(layout.parameters)}
        self._slots = [
            (module._parameters, key, parameter, index[id(parameter)])
            for module in self._modules
            for key, parameter in module._parameters.items()
            if id(parameter) in index
        ]
        self._leaves: list[nn.Parameter] = []
        self._memory: list[int] = []
        self._flags = [(each, each.requires_grad) for each in (*places.others, *places.frozen)]
        self._groups = [(group, group["params"]) for group in base.param_groups]
        # Changed in place, since a base optimizer's `state` may belong to another object.
        self._state: MutableMapping[Any, Any] = base.state
        self._held: dict[Any, Any] | None = None

    @contextmanager
    def displaced(self, at: Displacement | None) -> Iterator[Sequence[Tensor]]:
        parameters = self._layout.parameters
        with torch.no_grad():
            if at is None:
                # Not copies, since a closure's in-place writes to weights must be kept.
                points = [parameter.detach() for parameter in parameters]
            else:
                values = self._layout.views(self._pool.take_vector())
                at.add_to(parameters, values)
                del at  # maybe the last reference; its memory is free now
                points = [
                    value if value.dtype == parameter.dtype else value.to(parameter.dtype)
                    for value, parameter in zip(values, parameters, strict=True)
                ]
        self._leaves = [nn.Parameter(point) for point in points]
        self._memory = [leaf.data_ptr() for leaf in self._leaves]
        torch.clear_autocast_cache()
        try:
            yield self._leaves
        finally:
            for leaf in self._leaves:
                setattr(leaf, OVER, True)
            self._leaves = []

    @contextmanager
    def running(self, *, keep_buffers: bool) -> Iterator[None]:
        if keep_buffers and self._kept_buffers is not None:
            buffers = self._kept_buffers
        else:
            buffers = _cloned(self._kept_buffers or self._live_buffers)
        try:
            for held, key, _, t in self._slots:
                held[key] = self._leaves[t]
            leaves = dict(zip(map(id, self._layout.parameters), self._leaves, strict=True))
            for group, parameters in self._groups:
                group["params"] = [leaves.get(id(each), each) for each in parameters]
            self._held = dict(self._state)
            _refill(self._state, {leaves.get(id(key), key): h for key, h in self._held.items()})
            self._put_buffers(buffers)
            try:
                yield
            except NoGradientError:  # the step may go on without a gradient
                self._keep(keep_buffers)
                raise
            self._refuse_changes()
            self._keep(keep_buffers)
        finally:
            self._put_back()

    def _keep(self, keep_buffers: bool) -> None:
        if keep_buffers:
            self._kept_buffers = [dict(module._buffers) for module in self._modules]

    @torch.no_grad()
    def _refuse_changes(self) -> None:
        """Check that a closure has not changed the leaves in a way that would not reach the model.

        Raises:
            RuntimeError: If it has changed `requires_grad` or assigned `.data`.
        """
        changed = [
            self._places.name(t) for t, leaf in enumerate(self._leaves) if not leaf.requires_grad
        ]
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
                changed.append("a parameter that is not optimised")
        if changed:
            raise RuntimeError(
                f"a closure has changed requires_grad of {changed[0]}, which the functional "
                "engine's copies do not carry to the model; do that before step(), or pass "
                "engine='inplace' to gk.wrap()"
            )
        for t, (leaf, memory) in enumerate(zip(self._leaves, self._memory, strict=True)):
            if leaf.data_ptr() != memory or leaf.shape != self._layout.shapes[t]:
                raise RuntimeError(
                    f"a closure has given the parameter {self._places.name(t)!r} another .data, "
                    "which the functional engine's copies do not carry to the model; write to the "
                    "values in place, or pass engine='inplace' to gk.wrap()"
                )

    def _put_buffers(self, buffers: Buffers) -> None:
        for module, values in zip(self._modules, buffers, strict=True):
            if values or module._buffers:
                module._buffers.clear()
                module._buffers.update(values)

    def _put_back(self) -> None:
        # The model first, since restoring the base optimizer's attributes may fail.
        self._put_buffers(self._live_buffers)
        for held, key, parameter, _ in self._slots:
            held[key] = parameter
        for group, parameters in self._groups:
            group["params"] = parameters
        if self._held is not None:
            _refill(self._state, self._held)
            self._held = None

    def differentiate(
        self,
        loss: Tensor,
        leaves: Sequence[Tensor],
        *,
        retain_graph: bool,
        receivers: Receivers,
    ) -> list[Tensor | None]:
        # The live parameters are inputs, too: a graph that reaches one of them bypasses the leaves.
        live = self._layout.parameters
        inputs = [*leaves, *live]
        backward(loss, inputs, retain_graph=retain_graph, leaves=leaves, receivers=receivers)
        self._refuse_live([parameter.grad for parameter in live])
        return take_grads(leaves)

    def collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:
        self._refuse_live([parameter.grad for parameter in self._layout.parameters])
        if all(leaf.grad is None for leaf in leaves):
            return None
        return take_grads(leaves)

    def _refuse_live(self, grads: Sequence[Tensor | None]) -> None:
        for t, grad in enumerate(grads):
            if grad is not None:
                raise RuntimeError(
                    "the loss was computed outside the closure, or depends on the parameter "
                    f"{self._places.name(t)!r} by way of a reference made there (a cached "
                    "parameter list, say), which does not see displaced weights; call the model "
                    "inside the closure, and look parameters up in it there, or pass "
                    "engine='inplace' to gk.wrap()"
                )

    def commit(self) -> None:
        if self._kept_buffers is None:
            return
        old: list[Tensor] = []
        new: list[Tensor] = []
        for module, live, kept in zip(
            self._modules, self._live_buffers, self._kept_buffers, strict=True
        ):
            for key in live.keys() - kept.keys():
                del module._buffers[key]
            for key, value in kept.items():
                before = live.get(key)
                if before is not None and value is not None and _can_be_written(before, value):
                    old.append(before)
                    new.append(value)
                else:
                    module._buffers[key] = value
        if old:
            with torch.no_grad():
                torch._foreach_copy_(old, new)

    def rollback(self) -> None:
        self._put_back()


def _refill(state: MutableMapping[Any, Any], items: dict[Any, Any]) -> None:
    state.clear()
    state.update(items)


def _cloned(buffers: Buffers) -> Buffers:
    # A buffer that several modules share stays shared.
    clones: dict[int, Tensor | None] = {id(None): None}
    for held in buffers:
        for buffer in held.values():
            if buffer is not None and id(buffer) not in clones:
                clones[id(buffer)] = buffer.detach().clone()
    return [{key: clones[id(buffer)] for key, buffer in held.items()} for held in buffers]


def _can_be_written(live: Tensor, value: Tensor) -> bool:
    """Whether the new value can be copied to the live tensor in place."""
    return live.shape == value.shape and live.dtype == value.dtype and not is_expanded(live)
