"""Equal projections on all gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.core.flat import Scope
from gradkit.surgery.inputs import RuleInputs
from gradkit.surgery.memory import Remembered, Weighed
from gradkit.surgery.rule import GramRule, check_scope
from gradkit.surgery.spectrum import (
    cosine_solution,
    gradient_norms,
    narrowed,
    reciprocal,
    sum_to_one,
    widened,
)


@dataclass(eq=False)
class IMTLG(GramRule):
    """Impartial multi-task learning ([Liu et al., ICLR 2021](https://openreview.net/forum?id=IMPnRXEWpvr)).

    Of the weighted sums with weights of sum 1, the one whose projections on all gradients'
    directions u_i = g_i/‖g_i‖ are equal:

        d = Σ_i w_i·g_i,   Σ_i w_i = 1,   ⟨d, u_1⟩ = … = ⟨d, u_K⟩

    That is w ∝ G⁻¹·√diag(G). With two gradients w = (‖g_2‖, ‖g_1‖)/(‖g_1‖ + ‖g_2‖).

    Dependent gradients: with C the matrix of cosines and N that of lengths, w ∝ N⁻¹·C⁺·1, the
    projections nearest to equal, whatever the lengths: the line of d does not change when one
    objective is rescaled, which is what the method is for. For two gradients it is what the formula
    above tends to as they become parallel. (TorchJD's G⁺·√diag(G), the same for independent
    gradients, gives most weight to the longer of two parallel ones.) Eigenvalues of C below 1e-7 of
    the largest count as zero. A gradient of length 0 has weight 0.

    Fallback: where the weights before normalisation sum to zero no weights of sum 1 will do, and
    all are 0. That sum may be negative, too, when lengths differ much: then d turns against all
    objectives, as the paper's formula has it.

    Homogeneous of degree 1. Cost: none beyond the gradients; for K > 2 an eigendecomposition of
    K × K, for which the host waits where it runs on a GPU. State: none.

    Args:
        scope: What inner products are taken over: all parameters, each "group", each "tensor",
            or those that are "shared" by objectives.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.IMTLG()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.0767, 1.0000, 1.0000])
    """

    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_scope(self.scope)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        norms = gradient_norms(wide)
        if gram.shape[-1] == 2:
            other = norms.flip(-1)
            # Beside a gradient of length 0 all weight is on the other one.
            weights = sum_to_one(other.where(other > 0, norms) * (norms > 0))
        else:
            solution, _ = cosine_solution(wide, wide.new_ones(gram.shape[-1]))
            weights = sum_to_one(solution * reciprocal(norms))
        return narrowed(weights, finite, gram), memory
