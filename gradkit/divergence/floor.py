"""Bounds that keep values finite and let gradients through."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LIMIT = 30.0
"""How far log-ratios of probabilities may be from 0."""

_LOWEST = -1e6  # in the place of log 0; its exponential is 0


class _Raised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, floor: Tensor | float) -> Tensor:
        return x.clamp(min=floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor | None) -> Tensor:
        return tangent.clone()


def raised(x: Float[Tensor, "*shape"], floor: Tensor | float) -> Float[Tensor, "*shape"]:
    """max(x, floor), whose gradient in x is 1 everywhere, and 0 in the floor.

    A clamp would have the gradient 0 below the floor: what is far too small would stay so.

    Examples:
        >>> x = torch.tensor([1.0, -torch.inf], requires_grad=True)
        >>> raised(x, -30.0).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    result: Tensor = _Raised.apply(x, floor)  # type: ignore[no-untyped-call] # torch's own
    return result


def lowered(x: Float[Tensor, "*shape"], ceiling: float) -> Float[Tensor, "*shape"]:
    """min(x, ceiling), whose gradient in x is 1 everywhere."""
    return -raised(-x, -ceiling)


def finite_logs(log_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Logarithms of probabilities with a large negative number for log 0."""
    return raised(log_p, _LOWEST)


def in_float32(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def log_complement(log_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 − p); p above 1 − e^−30 counts as 1 − e^−30.

    Examples:
        >>> log_complement(torch.tensor([0.25, 1.0]).log())
        tensor([ -0.2877, -30.0000])
    """
    log_p = lowered(log_p, -math.exp(-LIMIT))
    large = log_p > -math.log(2)
    # Each branch where it is exact; the other one gets a number whose gradient is finite.
    above = torch.log(-torch.expm1(torch.where(large, log_p, -1.0)))
    below = torch.log1p(-torch.exp(torch.where(large, -1.0, log_p)))
    return torch.where(large, above, below)
