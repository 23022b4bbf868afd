"""Weights by the rate at which losses fall."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradkit.core.arguments import check_count, check_number
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed, needed
from gradkit.weighting.loss_weighting import LossWeighting


@dataclass(eq=False)
class DWA(LossWeighting):
    """Dynamic weight average ([Liu et al., CVPR 2019](https://arxiv.org/abs/1803.10704)).

        rᵢ(t) = L̄ᵢ(t−1) / L̄ᵢ(t−2)        in the first two epochs 1
        w(t) = K·softmax(r(t) / T)
        step on ∇ Σ wᵢLᵢ

    L̄(t) is the mean loss of epoch t. For the paper's method, set `steps_per_epoch` to the number
    of batches of an epoch; 1 compares single steps, which are noisy. Only steps in which an
    objective takes part are counted for it.

    Losses multiplied by s multiply the direction by s; weights depend on ratios only. Losses must
    be positive, since the ratio has no meaning otherwise. If the loss L̄ᵢ(t−2) is exactly 0, the
    ratio is 1, as for a constant loss; the authors' code divides by 0 there.

    Cost: none beyond the gradients. State: for each objective the last two epochs' mean losses, the
    sum of the present epoch's losses, and the numbers of steps and epochs.

    Args:
        temperature: T; a large one makes the weights equal.
        steps_per_epoch: The number of steps over which losses are averaged.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> weighting = gk.DWA()
        >>> weighting(torch.tensor([1.0, 1.0])), weighting(torch.tensor([0.5, 1.0]))
        (tensor([1., 1.]), tensor([1., 1.]))
        >>> weighting(torch.tensor([0.4, 1.0]))  # 2·softmax(0.5/2, 1/2): the second fell less
        tensor([0.8756, 1.1244])
    """

    temperature: float = 2.0
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        check_count("steps_per_epoch", self.steps_per_epoch, 1)

    def init(self, count: int) -> dict[str, Tensor]:
        """The mean losses of two epochs, the present sum, and the numbers of steps and epochs."""
        keys = ("last", "before_last", "total", "steps", "epochs")
        return {key: torch.zeros(count, dtype=torch.float64) for key in keys}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        losses = needed(inputs.first_losses, self)
        known = (memory["epochs"] >= 2) & (memory["before_last"] != 0)
        ratios = torch.where(known, memory["last"] / memory["before_last"], 1.0)
        ratios = ratios.clamp(max=torch.finfo(ratios.dtype).max)  # for example after 1e-310
        weights = len(losses) * (ratios / self.temperature).softmax(0)
        total, steps = memory["total"] + losses, memory["steps"] + 1
        ends = steps >= self.steps_per_epoch
        zero = torch.zeros_like(total)
        return weights, {
            "last": torch.where(ends, total / steps, memory["last"]),
            "before_last": torch.where(ends, memory["last"], memory["before_last"]),
            "total": torch.where(ends, zero, total),
            "steps": torch.where(ends, zero, steps),
            "epochs": memory["epochs"] + ends,
        }
