"""Weights by learnt uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed, needed
from gradkit.weighting.adam import adam, adam_memory
from gradkit.weighting.loss_weighting import LossWeighting


@dataclass(eq=False)
class UW(LossWeighting):
    """Uncertainty weighting ([Kendall et al., CVPR 2018](https://arxiv.org/abs/1705.07115)).

    Each objective's log-variance s = ln σ² is learned together with the weights θ, by gradients of

        Σ Lᵢ / (2·exp(sᵢ)) + sᵢ/2

        wᵢ = 1 / (2·exp(sᵢ))
        step on ∇ Σ wᵢLᵢ
        sᵢ ← Adam(sᵢ, ½ − ½·Lᵢ·exp(−sᵢ))        both from the same sᵢ

    s tends to ln L, where w·L = ½ for every objective. The form, with ½ also for classification
    losses, and the initial s are LibMTL's. In the paper one optimizer learns θ and s. Here s has
    its own Adam (betas 0.9 and 0.999), independent of the base optimizer and its learning rate. The
    default `lr` is that of the released comparison code of Nash-MTL, whose Adam has a group for s.
    With it, s falls by 1 in 40 steps and rises more slowly: for a loss of 10 it converges in about
    500 steps, for one of 300 in about 3000, since Adam's second moment decays slowly after the
    large first gradients. Start with a higher `initial` for such losses.

    Not homogeneous. Cost: none beyond the gradients. State: for each objective s, and Adam's
    moments and step count.

    Args:
        lr: The learning rate of s.
        initial: The initial s; the default gives w = 0.82.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> weighting = gk.UW(lr=0.1, initial=0.0)
        >>> weighting(torch.tensor([9.0, 0.1]))  # 1/2 at first
        tensor([0.5000, 0.5000])
        >>> weighting(torch.tensor([9.0, 0.1]))  # exp(-0.1)/2 and exp(0.1)/2
        tensor([0.4524, 0.5526])
    """

    joins = False
    lr: float = 0.025
    initial: float = -0.5

    def __post_init__(self) -> None:
        check_number("lr", self.lr, least=0)
        check_number("initial", self.initial)

    def init(self, count: int) -> dict[str, Tensor]:
        """The log-variances, and Adam's memory."""
        s = torch.full((count,), self.initial, dtype=torch.float64)
        return {"s": s, **adam_memory(count)}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        losses = needed(inputs.first_losses, self)
        s = memory["s"]
        weights = (-s).exp()
        learnt, remembered = adam(s, (1 - losses * weights) / 2, memory, self.lr)
        return weights / 2, {"s": learnt, **remembered}
