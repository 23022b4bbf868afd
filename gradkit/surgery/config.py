"""A direction with chosen cosines to all gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Preference, RuleInputs, check_preference
from gradkit.surgery.memory import Remembered, Weighed
from gradkit.surgery.rule import GramRule, check_scope
from gradkit.surgery.spectrum import cosine_solution, gradient_norms, narrowed, reciprocal, widened


@dataclass(eq=False)
class ConFIG(GramRule):
    """Conflict-free training ([Liu et al., ICLR 2025](https://arxiv.org/abs/2408.11104)).

    With u_i = g_i/‖g_i‖ the rows of U, and p the preference (1 each by default):

        v = U⁺·p                                the cosines ⟨v, u_i⟩ are in the ratio of p
        d = (Σ_i ⟨g_i, v⟩)·v / ‖v‖²             as long as the gradients' projections together

    By the matrix of cosines C = U·Uᵀ, with a = C⁺·p:   w_i = (Σ_j ‖g_j‖·(C·a)_j / aᵀC·a)·a_i/‖g_i‖.
    With two gradients and no preference that is (‖g_1‖ + ‖g_2‖)/(2·‖g_i‖).

    Dependent gradients: the cosines are as near to p as they can be. Eigenvalues of C below 1e-7 of
    the largest count as zero. A gradient of length 0 has weight 0. Fallback: where p is orthogonal
    to all directions (opposite gradients) there is no such v, and all weights are 0.

    Homogeneous of degree 1. Cost: none beyond the gradients; for K > 2 an eigendecomposition of
    K × K, for which the host waits where it runs on a GPU. State: none.

    Args:
        preference: p, one number of at least 0 for each objective, in their order or by their
            names; only their ratios matter. None: 1 each.
        scope: What inner products are taken over: all parameters, each "group", each "tensor",
            or those that are "shared" by objectives.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.ConFIG()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.1588, 2.0706, 2.0706])
    """

    preference: Preference | None = None
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_preference("preference", self.preference, positive=True)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        norms = gradient_norms(wide)
        if gram.shape[-1] == 2 and self.preference is None:
            other = norms.flip(-1)
            # A gradient beside one of length 0 stays as it is.
            other = other.where(other > 0, norms)
            return narrowed((norms + other) / 2 * reciprocal(norms), finite, gram), memory
        if self.preference is None:
            target = wide.new_ones(gram.shape[-1])
        else:
            target = inputs.numbers(self.preference, wide)
        solution, attained = cosine_solution(wide, target)
        projections = (norms * attained).sum(-1, keepdim=True)
        square = (solution * attained).sum(-1, keepdim=True)
        weights = projections * reciprocal(square) * solution * reciprocal(norms)
        return narrowed(weights, finite, gram), memory
