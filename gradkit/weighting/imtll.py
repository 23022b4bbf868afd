"""Learnt scales that bring all losses to the same size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed, needed
from gradkit.weighting.adam import adam, adam_memory
from gradkit.weighting.loss_weighting import LossWeighting


@dataclass(eq=False)
class IMTLL(LossWeighting):
    """The loss balance of impartial multi-task learning ([Liu et al., ICLR 2021](https://openreview.net/forum?id=IMPnRXEWpvr)).

    Each objective's scale s is learned together with the weights θ, by gradients of

        Σ exp(sᵢ)·Lᵢ − sᵢ

        wᵢ = exp(sᵢ)
        step on ∇ Σ wᵢLᵢ
        sᵢ ← Adam(sᵢ, exp(sᵢ)·Lᵢ − 1)        both from the same sᵢ

    s tends to −ln L, where w·L = 1 for every objective. This is twice `UW` with s of the other
    sign, but starts from w = 1. A loss that stays at 0 or below lets s grow without limit.

    The paper's hybrid balances losses and gradients. In LibMTL's form, IMTL-G combines the scaled
    gradients of shared parameters, and heads get their own scaled gradients:

        gk.wrap(base, gk.IMTLL(), gk.IMTLG(scope="shared"), model=model)

    The form and the initial s = 0 are those of LibMTL and TorchJD; of the paper only the abstract
    was available. There one optimizer learns θ and s. Here s has its own Adam (betas 0.9 and
    0.999), independent of the base optimizer and its learning rate. No source gives a rate for it:
    the default is that of `UW`, which says how fast it is.

    Not homogeneous. Cost: none beyond the gradients. State: for each objective s, and Adam's
    moments and step count.

    Args:
        lr: The learning rate of s.
        initial: The initial s; the default gives w = 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> weighting = gk.IMTLL(lr=0.1)
        >>> weighting(torch.tensor([9.0, 0.1]))  # 1 at first
        tensor([1., 1.])
        >>> weighting(torch.tensor([9.0, 0.1]))  # exp(-0.1) and exp(0.1)
        tensor([0.9048, 1.1052])
    """

    joins = False
    lr: float = 0.025
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_number("lr", self.lr, least=0)
        check_number("initial", self.initial)

    def init(self, count: int) -> dict[str, Tensor]:
        """The scales, and Adam's memory."""
        s = torch.full((count,), float(self.initial), dtype=torch.float64)
        return {"s": s, **adam_memory(count)}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        losses = needed(inputs.first_losses, self)
        s = memory["s"]
        weights = s.exp()
        learnt, remembered = adam(s, losses * weights - 1, memory, self.lr)
        return weights, {"s": learnt, **remembered}
