"""The Gram matrix of objectives' gradients, without storing the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator, inner_products


def streamed_gram(losses: Float[Tensor, " K"], leaves: Sequence[Tensor]) -> Float[Tensor, "K K"]:
    """The Gram matrix of the losses' gradients, which stores one leaf's gradients at a time.

    One backward pass, batched over the losses by `torch.vmap`, computes each leaf's K gradients at
    once. Their inner products are summed and the gradients are freed. The gradients of activations
    need K times the memory of a single pass.

    Args:
        losses: The losses with their graph, which is kept.
        leaves: The tensors to differentiate with respect to.

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
        # A hook must return a gradient of the same shape; an expanded one takes no memory.
        left: Tensor = _Collect.apply(grad, add)  # type: ignore[no-untyped-call]  # untyped in torch
        return left.expand_as(grad)

    def pull(cotangent: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        torch.autograd.grad(losses, leaves, cotangent, retain_graph=True, allow_unused=True)
        return cotangent

    identity = torch.eye(count, dtype=losses.dtype, device=losses.device)
    hooks = [
        leaf.register_hook(let_go)  # type: ignore[no-untyped-call]  # untyped in torch
        for leaf in leaves
    ]
    try:
        torch.func.vmap(pull, randomness="same")(identity)
    except RuntimeError as error:  # few of these messages say that batching has failed
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
    """Passes a batch of gradients to a function from inside `vmap`; returns a zero."""

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
