"""The geometric mean of losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed, too_low
from gradkit.weighting.loss_weighting import LossWeighting


@dataclass(eq=False)
class GLS(LossWeighting):
    """Geometric loss strategy ([Chennupati et al., CVPRW 2019](https://arxiv.org/abs/1904.08492)).

        step on ∇ (∏ Lᵢ)^{1/K}
        wᵢ = (∏ Lⱼ)^{1/K} / (K·Lᵢ)

    The scale of a single loss changes only the norm of the direction. The product is computed from
    logarithms, so that it neither overflows nor underflows.

    Losses multiplied by s multiply the direction by s. With one objective w = 1. With several,
    losses must be positive: at 0 the geometric mean has no gradient. A loss of 0 or less gives NaN,
    which no step applies unless `nonfinite="ignore"`.

    Cost: none beyond the gradients. State: none.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.GLS()(torch.tensor([1.0, 4.0]))  # the geometric mean is 2
        tensor([1.0000, 0.2500])
    """

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        losses = inputs.needed_losses(self)
        if len(losses) == 1:
            return torch.ones_like(losses), memory
        logs = losses.log()
        return (logs.mean() - logs).exp() / len(losses), memory

    def objection(self, losses: Mapping[str, float]) -> str | None:
        return too_low(self, losses, 0.0, "positive losses")
