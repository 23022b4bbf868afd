"""Objectives weighed before they are back-propagated, without a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator, inner_products


def streamed_gram(losses: Float[Tensor, " K"], leaves: Sequence[Tensor]) -> Float[Tensor, "K K"]:
    """The Gram matrix of the losses' gradients, of which no more than one leaf's are ever held.

    One backward pass, batched over the losses by `torch.vmap`, brings each leaf's K gradients at
    once; their inner products are added up and they are let go. Activations' gradients are K times
    those of a single pass.

    Args:
        losses: With their graph, which is kept.
        leaves: What to differentiate with respect to.

    Raises:
        RuntimeError: If the graph holds an operation that cannot be batched.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> streamed_gram(torch.stack([w.sum(), w.prod()]), [w])
        tensor([[ 2.,  7.],
                [ 7., 25.]], dtype=torch.float64)
    """
    count = len(losses)
    total = torch.zeros(count, count, dtype=accumulator(losses.device), device=losses.device)

    def add(grads: Tensor) -> None:
        rows = grads.reshape(count, -1)
        total.add_(inner_products(rows, rows))

    def let_go(grad: Tensor) -> Tensor:
        # A hook must return a gradient of the same shape; this one takes no memory.
        left: Tensor = _Collect.apply(grad, add)  # type: ignore[no-untyped-call]
        return left.expand_as(grad)

    def pull(cotangent: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        torch.autograd.grad(losses, leaves, cotangent, retain_graph=True, allow_unused=True)
        return cotangent

    identity = torch.eye(count, dtype=losses.dtype, device=losses.device)
    hooks = [leaf.register_hook(let_go) for leaf in leaves]  # type: ignore[no-untyped-call]
    try:
        torch.func.vmap(pull, randomness="same")(identity)
    except RuntimeError as error:  # few of these say that it is batching that fails
        if type(error) is not RuntimeError:
            raise
        raise RuntimeError(
            "the losses cannot be differentiated in one batch (see above for the operation); "
            "pass rows='keep' to gk.wrap(), which takes them one by one"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return total


class _Collect(torch.autograd.Function):
    """Hands on a batch of gradients from inside `vmap`; returns a zero."""

    @staticmethod
    def forward(grad: Tensor, add: Any) -> Tensor:
        raise RuntimeError("outside vmap there is no batch")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, add: Any) -> tuple[Tensor, None]:
        if in_dims[0] is None:
            add(grad.expand(info.batch_size, *grad.shape))
        else:
            add(grad.movedim(in_dims[0], 0))
        return grad.new_zeros(()), None
