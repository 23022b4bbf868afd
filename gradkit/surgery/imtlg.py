"""A direction with equal projections on all gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
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

    The weighted sum, with weights of sum 1, whose projections on all gradients' directions
    u_i = g_i/‖g_i‖ are equal:

        d = Σ_i w_i·g_i,   Σ_i w_i = 1,   ⟨d, u_1⟩ = … = ⟨d, u_K⟩

    That is w ∝ G⁻¹·√diag(G). With two gradients w = (‖g_2‖, ‖g_1‖)/(‖g_1‖ + ‖g_2‖).

    Dependent gradients: with C the matrix of cosines and N the diagonal matrix of norms,
    w ∝ N⁻¹·C⁺·1. The projections are then as nearly equal as possible, whatever the norms: scaling
    one objective does not change the line of d, which is the purpose of the method. For two
    gradients this is the limit of the formula above as they become parallel. (TorchJD's
    G⁺·√diag(G) is the same for independent gradients, but of two parallel ones it gives most weight
    to the larger.) Eigenvalues of C below 1e-7 of the largest count as zero. A zero gradient has
    weight 0.

    Fallback: if the weights before normalisation sum to zero, there are no weights of sum 1, and
    all are 0. That sum may also be negative when norms differ much: then d worsens all objectives,
    as the paper's formula does.

    Homogeneous of degree 1. Cost: none beyond the gradients; for K > 2 an eigendecomposition of a
    K × K matrix, for which the host waits if it runs on a GPU. State: none.

    Args:
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        ValueError: If `scope` has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.IMTLG()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.0767, 1.0000, 1.0000])
    """

    scope: Scope = "global"

    def solves(self, count: int) -> bool:
        return count > 2

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        norms = gradient_norms(wide)
        if gram.shape[-1] == 2:
            other = norms.flip(-1)
            # If one of the gradients is zero, the other one has all the weight.
            weights = sum_to_one(other.where(other > 0, norms) * (norms > 0))
        else:
            solution, _ = cosine_solution(wide, wide.new_ones(gram.shape[-1]))
            weights = sum_to_one(solution * reciprocal(norms))
        return narrowed(weights, finite, gram), memory
