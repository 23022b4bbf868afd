"""MGDA's minimum-norm vector, regularised towards the mean gradient."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_preference
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.simplex import simplex_minimum


@dataclass(eq=False)
class SDMGrad(GramRule):
    """Direction-oriented multi-objective descent ([Xiao et al., NeurIPS 2023](https://arxiv.org/abs/2305.18409)).

    With g_p = Σ p_i g_i the target direction, by default the mean:

        w = argmin ½‖g_w + λ·g_p‖²    over w ≥ 0, Σ w_i = 1;   g_w = Σ w_i g_i
        d = (g_w + λ·g_p) / (1 + λ)

    λ = 0 is MGDA; large λ approaches g_p. In the paper, w is updated by projected stochastic
    gradient descent on inner products of two independent batches; here the problem is solved
    exactly on the present batch. The authors' code takes 20 such steps with momentum on one batch,
    which end far from the minimum unless the gradients are similar, and start from the w of the
    step before; its d is K times as large, clipped to norm 1. Its λ is 0.3 or, by class, 0.6.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        lambda_: λ ≥ 0, the pull towards the target.
        preference: p, one number ≥ 0 for each objective, in order or by name; 1/K each by default.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `lambda_` is not a number, or `preference` no sequence or mapping of numbers.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.SDMGrad()(jacobian).round(decimals=4).abs()  # g_w cancels 0.3·(1, 1, 1) in the first
        tensor([0., 1., 1.])
    """

    lambda_: float = 0.3
    preference: Preference | None = None
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("lambda_", self.lambda_, least=0)
        check_preference("preference", self.preference, least=0)

    def solves(self, count: int) -> bool:
        return count > 2

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        target = inputs.shares(self.preference, gram)
        w = simplex_minimum(gram, self.lambda_ * (gram @ target))
        return (w + self.lambda_ * target) / (1 + self.lambda_), memory
