"""The sum of the gradients, each projected so that it conflicts with none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.dualproj import regularized
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_preference
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.dual_cone import project_onto_dual_cone


@dataclass(eq=False)
class UPGrad(GramRule):
    """Unconflicting projection of gradients ([Quinton & Rey, 2024](https://arxiv.org/abs/2406.16232)).

        d = Σ_i p_i·π(g_i)

    where π projects onto the dual cone of the gradients, {d : ⟨d, g_j⟩ ≥ 0 for all j}. In terms of
    weights, π(g_i) = vᵀJ with v = argmin vᵀGv over v ≥ e_i. With reg = 0 the result conflicts
    with no gradient; otherwise ⟨d, g_j⟩ ≥ −reg·trace(G)·w_j with w the weights. The direction
    scales linearly with the norm of each gradient.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        preference: p, one number ≥ 0 for each objective, in order or by name; 1/K each by default.
        reg: The projection is computed with G/trace(G) + reg·I, which makes it unique. With 0 it is
            one of the solutions. (TorchJD does not project where trace(G) < 1e-4, its `norm_eps`.)
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `reg` is not a number, or `preference` no sequence or mapping of numbers.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.UPGrad()(jacobian)
        tensor([0.2929, 1.9004, 1.9004])
        >>> gk.UPGrad(reg=0.0)(jacobian)
        tensor([0.2924, 1.9006, 1.9006])
    """

    preference: Preference | None = None
    reg: float = 1e-4
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("reg", self.reg, least=0)
        check_preference("preference", self.preference, least=0)

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        bounds = torch.diag(inputs.shares(self.preference, gram)).expand(gram.shape)
        return project_onto_dual_cone(regularized(gram, self.reg), bounds).sum(-2), memory
