"""α-fair allocation of progress between objectives."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.fair import fair_weights


@dataclass(eq=False)
class FairGrad(GramRule):
    """Fair resource allocation in multi-task learning ([Ban & Ji, ICML 2024](https://arxiv.org/abs/2402.15638)).

        G·a = a^(−1/α),  a > 0        d = Σ a_i g_i

    d maximises the α-fair utility Σ ⟨g_i, d⟩^(1−α)/(1−α) within a ball. α = 1 is Nash-MTL. For
    α → 0, d approaches the sum of the gradients projected so that it conflicts with none, K times
    `DualProj(reg=0)`; for large α, the best worst-case improvement. The equation is solved by
    Newton's method on the convex function whose stationary point it describes.

    If the gradients are Pareto-stationary there is no solution: then G's cosines are regularised
    (see `fair_weights`). A zero gradient has weight 0.

    Homogeneous of degree (1 − α)/(1 + α). Cost: none beyond the gradients. State: none.

    Args:
        alpha: α > 0; the larger, the more the worst-off objective counts.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `alpha` is not a number.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.FairGrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))  # Nash-MTL's
        tensor([0.0766, 0.9985, 0.9985])
    """

    alpha: float = 1.0
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, above=0)
        self.degree = (1 - self.alpha) / (1 + self.alpha)

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        return fair_weights(inputs.gram, self.alpha), memory
