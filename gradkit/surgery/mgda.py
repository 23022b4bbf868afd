"""The minimum-norm vector in the gradients' convex hull."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.simplex import simplex_minimum

Normalization = Literal["none", "l2", "loss", "loss+"]


@dataclass(eq=False)
class MGDA(GramRule):
    """Multiple-gradient descent (Désidéri, 2012; [Sener & Koltun, NeurIPS 2018](https://arxiv.org/abs/1810.04650)).

        w = argmin ‖Σ w_i g_i/s_i‖²    over w ≥ 0, Σ w_i = 1
        d = Σ w_i g_i

    With s = 1, d is the minimum-norm vector in the convex hull of the gradients: it conflicts with
    none of them, and is 0 where they are Pareto-stationary. As in Sener and Koltun's code, other s
    change how w is computed, but the gradients that are weighted are not normalised.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        normalization: s_i: "none" 1, "l2" ‖g_i‖, "loss" L_i, "loss+" L_i·‖g_i‖. If s_i is 0, it is
            replaced by 1. The last two need losses: `rule(jacobian, losses)`.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.MGDA()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])).abs()
        tensor([0., 1., 1.])
        >>> gk.MGDA().weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.6000, 0.4000])
    """

    normalization: Normalization = "none"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if self.normalization not in get_args(Normalization):
            raise ValueError(
                f"normalization is {self.normalization!r}; choose one of "
                f"{', '.join(get_args(Normalization))}"
            )

    @property
    def needs_losses(self) -> bool:
        """Whether the gradients are divided by losses."""
        return self.normalization in ("loss", "loss+")

    def solves(self, count: int) -> bool:
        return count > 2

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        if self.normalization == "none":
            return simplex_minimum(gram), memory
        divisors = gram.new_ones(gram.shape[:-1])
        if self.normalization in ("l2", "loss+"):
            divisors = divisors * gram.diagonal(dim1=-2, dim2=-1).sqrt()
        if self.needs_losses:
            divisors = divisors * inputs.needed_losses(self).to(gram)
        divisors = torch.where(divisors == 0, torch.ones_like(divisors), divisors)
        return simplex_minimum(gram / divisors[..., :, None] / divisors[..., None, :]), memory
