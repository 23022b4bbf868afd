"""Decays of exponential moving averages."""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.context import Context


def warmed_up(decay: float, t: int) -> float:
    """The decay of step t = 1, 2, … of an average that starts as a plain mean."""
    return min(1 - 1 / (t + 1), decay)


def like(value: float, context: Context) -> Float[Tensor, ""]:
    """A number as a tensor on the gradients' device, in float32 or wider.

    In half precision a decay of 0.999 would be 1.
    """
    assert context.gradients is not None  # set before after_step
    scale = context.gradients.lr_scale
    return torch.full_like(scale, value, dtype=torch.promote_types(scale.dtype, torch.float32))


def check_decay(name: str, value: float) -> None:
    """Check that an argument is a decay.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not between 0 and 1.
    """
    if isinstance(value, Real) and not 0 <= value <= 1:  # NaN lies nowhere
        raise ValueError(f"{name} is {value}; a decay lies between 0 and 1")
    check_number(name, value)
