"""Adam for the numbers that a weighting learns, one for each objective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

_BETAS = (0.9, 0.999)
_EPS = 1e-8


def adam_memory(count: int) -> dict[str, Tensor]:
    """The initial memory of `adam` for `count` numbers."""
    return {key: torch.zeros(count, dtype=torch.float64) for key in ("first", "second", "updates")}


def adam(
    numbers: Float[Tensor, " K"],
    gradient: Float[Tensor, " K"],
    memory: Mapping[str, Tensor],
    lr: float,
    decay: float = 0.0,
) -> tuple[Float[Tensor, " K"], dict[str, Tensor]]:
    """One step of Adam ([Kingma & Ba, ICLR 2015](https://arxiv.org/abs/1412.6980)), as in torch.

    Steps are counted for each number separately, so that numbers that appear later start in the
    same way as the others.

    Args:
        numbers: The learned numbers.
        gradient: Their gradient.
        memory: Both moments and the number of steps taken; see `adam_memory`.
        lr: The learning rate.
        decay: The weight decay (L2, not decoupled).

    Returns:
        The numbers after the step, and the new memory.

    Examples:
        >>> number = torch.tensor([1.0], dtype=torch.float64)
        >>> number, memory = adam(number, torch.tensor([5.0]).double(), adam_memory(1), lr=0.1)
        >>> number, memory["updates"]
        (tensor([0.9000], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    gradient = gradient + decay * numbers
    updates = memory["updates"] + 1
    first = torch.lerp(memory["first"], gradient, 1 - _BETAS[0])
    second = torch.lerp(memory["second"], gradient.square(), 1 - _BETAS[1])
    unbiased = first / (1 - _BETAS[0] ** updates)
    scale = (second / (1 - _BETAS[1] ** updates)).sqrt() + _EPS
    remembered = {"first": first, "second": second, "updates": updates}
    return numbers - lr * unbiased / scale, remembered
