"""Gradients by `backward`, of which the large ones are handed on as soon as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Receivers = Mapping[int, Callable[[Tensor], None]]
"""For some leaves, by position, what takes their gradient."""

# Which backward pass is under way. Not part of torch's public interface; without it nothing is
# handed on, and all gradients are collected at the end.
_current_pass: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)


def take_grads(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The leaves' `.grad`, which is None from then on."""
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


@contextmanager
def explaining_donated_buffers() -> Iterator[None]:
    """A context that says what to do where a compiled graph can be differentiated only once."""
    try:
        yield
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
    """A context in which `loss.backward()` hands gradients on to receivers as it makes them.

    Such a leaf's `.grad` becomes None when the next one's has been made: hooks that others have put
    on the node that accumulates it, which run after those here, still find it there.

    Args:
        loss: A scalar with its graph.
        leaves: The leaves.
        receivers: What takes the gradients of some of them.
    """
    if not receivers or _current_pass is None:
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
            # A pass that a function begins inside this one is that function's own affair; and a
            # sparse gradient is found to be an error where it is left.
            ours = current() == outermost[0]
            release()
            if ours and grad is not None and grad.layout == torch.strided:
                receive(grad)
                waiting.append(leaf)

        return hook

    handles = [loss.register_hook(begin)]  # type: ignore[no-untyped-call]
    try:
        for t, receive in receivers.items():
            if leaves[t].requires_grad:
                add = leaves[t].register_post_accumulate_grad_hook
                handles.append(add(hook_for(receive)))  # type: ignore[no-untyped-call]
        yield
    finally:
        release()
        for handle in handles:
            handle.remove()


def may_hand_on(modules: Sequence[nn.Module], leaves: Sequence[Tensor]) -> bool:
    """Whether nobody can miss a gradient that is taken away while the backward pass goes on.

    Hooks of others on a parameter or module may look at any parameter's `.grad`.
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
