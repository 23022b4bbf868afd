"""The mean without the extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_count
from gradkit.surgery.elementwise import ElementwiseRule

Choice = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class TrimmedMean(ElementwiseRule):
    """The mean without the extremes ([Yin et al., ICML 2018](https://arxiv.org/abs/1803.01498)).

    From Byzantine-Robust Distributed Learning, for each parameter p:

        drop the `trim` largest and the `trim` smallest of g_1p, …, g_Kp
        d_p = the mean of the others

    Dropped elements may be infinite. With fewer than 2·trim + 1 objectives, (K − 1) // 2 are
    dropped at either end, which leaves the median.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        trim: The number of elements to drop at either end, at least 0.

    Raises:
        TypeError: If `trim` is not an integer.
        ValueError: If it is negative.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.TrimmedMean()(torch.tensor([[1.0, 9.0], [2.0, -5.0], [900.0, 1.0]]))
        tensor([2., 1.])
    """

    trim: int = 1

    def __post_init__(self) -> None:
        check_count("trim", self.trim, 0)

    def merge(
        self, rows: Float[Tensor, "K n"], noise: Float[Tensor, " n"] | None, prepared: Any
    ) -> Float[Tensor, " n"]:
        count = len(rows)
        trim = min(self.trim, (count - 1) // 2)
        if trim == 0:
            return rows.sum(0).div_(count)
        # A sort by columns takes ten times as long for a few rows.
        kept = list(rows)
        for _ in range(trim):
            kept = _without_extreme(kept, torch.maximum, torch.minimum)
        for _ in range(trim):
            kept = _without_extreme(kept, torch.minimum, torch.maximum)
        total = torch.zeros_like(kept[0])
        for row in kept:
            total += row
        return total / len(kept)


def _without_extreme(rows: list[Tensor], extreme: Choice, other: Choice) -> list[Tensor]:
    """The elements of each column except the extreme one.

    Args:
        rows: The elements, one row after the other.
        extreme: Which of two elements is nearer to that extreme.
        other: The other one of the two.
    """
    found, kept = rows[0], []
    for row in rows[1:]:
        kept.append(other(found, row))
        found = extreme(found, row)
    return kept
