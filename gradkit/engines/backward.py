"""Gradients by `backward`, whose large tensors are consumed as soon as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Receivers = Mapping[int, Callable[[Tensor], None]]
"""For some leaves, by position, the function that consumes their gradient."""

NO_CONTEXT = nullcontext()
"""A context without effect. It has no state, so that one object serves every block."""

# The id of the current backward pass. Not part of torch's public interface; without it all
# gradients are collected at the end.
_current_pass: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)


def take_grads(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The leaves' gradients; their `.grad` is set to None."""
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


def backward(
    loss: Tensor,
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
    leaves: Sequence[Tensor] = (),
    receivers: Receivers = MappingProxyType({}),
) -> None:
    """`torch.autograd.backward`, whose gradients are passed to receivers as they are computed.

    Args:
        loss: A scalar with its graph.
        inputs: The tensors whose `.grad` is filled.
        retain_graph: Whether the graph is kept.
        leaves: The leaves, by the positions of which the receivers are known.
        receivers: The functions that consume the gradients of some leaves.

    Raises:
        RuntimeError: If a compiled graph is differentiated again after its memory was reused.
    """
    try:
        with handing_on(loss, leaves, receivers) if receivers else NO_CONTEXT:
            torch.autograd.backward(loss, inputs=inputs, retain_graph=retain_graph)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "several losses of one forward pass of a compiled model were to be differentiated one "
            "by one, but torch.compile lets the first backward pass reuse the graph's memory; set "
            "torch._functorch.config.donated_buffer = False before the model is compiled, or pass "
            "step() a closure for each objective"
        ) from error


@contextmanager
def handing_on(loss: Tensor, leaves: Sequence[Tensor], receivers: Receivers) -> Iterator[None]:
    """A context in which `loss.backward()` passes gradients to receivers as it computes them.

    A consumed gradient stays in its leaf's `.grad` until the next one has been computed, because
    other hooks on the node that accumulates it run after the hooks here, and may read it.

    Args:
        loss: A scalar with its graph.
        leaves: The leaves.
        receivers: The functions that consume the gradients of some leaves.
    """
    if _current_pass is None:
        yield
        return
    current, outermost = _current_pass, [-1]
    waiting: list[Tensor] = []

    def release() -> None:
        while waiting:
            waiting.pop().grad = None

    def begin(grad: Tensor) -> None:
        outermost[0] = current()

    def hook_for(receive: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            grad = leaf.grad
            # Gradients of a backward pass that a function starts inside this one are left alone.
            # Sparse gradients are left for `checked_grad`, which raises.
            ours = current() == outermost[0]
            release()
            if ours and grad is not None and grad.layout == torch.strided:
                receive(grad)
                waiting.append(leaf)

        return hook

    handles = [loss.register_hook(begin)]  # type: ignore[no-untyped-call]  # untyped in torch
    try:
        for t, receive in receivers.items():
            if leaves[t].requires_grad:
                add = leaves[t].register_post_accumulate_grad_hook
                handles.append(add(hook_for(receive)))  # type: ignore[no-untyped-call]  # untyped in torch
        yield
    finally:
        release()
        for handle in handles:
            handle.remove()


def may_hand_on(modules: Sequence[nn.Module], leaves: Sequence[Tensor]) -> bool:
    """Whether gradients may be consumed during the backward pass.

    They may not if there are other hooks on a parameter or module, which may read any parameter's
    `.grad`.
    """
    everywhere = nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        return False
    if any(
        module._backward_hooks or module._backward_pre_hooks or _reduces(module)
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
    ):
        return False
    return not any(
        leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None)
        for leaf in leaves
    )


def _reduces(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel)
