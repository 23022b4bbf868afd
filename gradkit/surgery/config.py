"""A direction with chosen cosines to all gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_preference
from gradkit.surgery.rule import GramRule
from gradkit.surgery.spectrum import cosine_solution, gradient_norms, narrowed, reciprocal, widened


@dataclass(eq=False)
class ConFIG(GramRule):
    """Conflict-free training ([Liu et al., ICLR 2025](https://arxiv.org/abs/2408.11104)).

    With u_i = g_i/‖g_i‖ the rows of U, and p the preference (1 each by default):

        v = U⁺·p                                the cosines ⟨v, u_i⟩ are in the ratio of p
        d = (Σ_i ⟨g_i, v⟩)·v / ‖v‖²             its norm is the sum of the gradients' projections

    By the matrix of cosines C = U·Uᵀ, with a = C⁺·p:   w_i = (Σ_j ‖g_j‖·(C·a)_j / aᵀC·a)·a_i/‖g_i‖.
    With two gradients and no preference that is (‖g_1‖ + ‖g_2‖)/(2·‖g_i‖).

    Dependent gradients: the cosines are as near to p as possible. Eigenvalues of C below 1e-7 of
    the largest count as zero. A zero gradient has weight 0. Fallback: if p is orthogonal to the
    range of C (opposite gradients), there is no such v, and all weights are 0.

    Homogeneous of degree 1. Cost: none beyond the gradients; for K > 2 an eigendecomposition of a
    K × K matrix, for which the host waits if it runs on a GPU. State: none.

    Args:
        preference: p, one number of at least 0 for each objective, in their order or by their
            names; only their ratios matter. None: 1 each.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `preference` is not a sequence or mapping of numbers.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.ConFIG()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.1588, 2.0706, 2.0706])
    """

    preference: Preference | None = None
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_preference("preference", self.preference, least=0)

    def solves(self, count: int) -> bool:
        return count > 2 or self.preference is not None

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        norms = gradient_norms(wide)
        if gram.shape[-1] == 2 and self.preference is None:
            other = norms.flip(-1)
            # If one of the gradients is zero, the other one is not changed.
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
