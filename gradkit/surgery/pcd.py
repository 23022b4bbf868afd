"""A main objective's gradient, with guaranteed progress for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_numbers
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.least_distance import least_distance
from gradkit.surgery.spectrum import reciprocal

# A direction's squared norm below this fraction of its terms is rounding error: the relative error
# of inner products of float32 gradients is about 1e-8.
_PRECISION = 1e-7


@dataclass(eq=False)
class PCD(GramRule):
    """Priority-constrained descent ([2026](https://arxiv.org/abs/2606.29521)).

    With g_m the main objective's gradient, ĝ_i = g_i/√(v̂_i + ε), and v̂ a bias-corrected average
    of ‖g_i‖² over steps, with decay β:

        d̃ = argmin ½‖d − ĝ_m‖²    subject to  ⟨ĝ_j, d⟩ ≥ τ_j·‖ĝ_j‖²  for every other j
        d = ‖g_m‖·d̃/‖d̃‖

    Along d̃ each of the others gets at least the fraction τ of the progress of a step along its own
    normalised gradient. If the constraints cannot all be met, d = g_m; if g_m or d̃ is 0, so is d.
    A d̃ counts as 0 if its squared norm is less than 1e-7 of its terms', as when g_m and another
    gradient are within 6e-4 of opposite. This is the precision of inner products of float32
    gradients.

    Implemented from another library's description of the method, and compared with that library and
    with the authors' code; the paper's text was not available.

    Homogeneous of degree 1 except for ε. Cost: none beyond the gradients. State: v and a step count
    for each objective.

    Args:
        tau: τ between 0 and 1, one for all others or one for each objective, in order or by name
            (the main objective's is ignored).
        beta: β in [0, 1).
        eps: ε ≥ 0.
        main: The main objective, by name or position. A position counts only objectives that take
            part in a step, so give the name if some may be absent.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.PCD(tau=0.0)(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])).round(decimals=3)
        tensor([-0.9730,  2.9200,  2.9200])
    """

    tau: float | Preference = 0.02
    beta: float = 0.999
    eps: float = 1e-8
    main: str | int = 0
    scope: Scope = "global"
    degree = None

    def __post_init__(self) -> None:
        check_numbers("tau", self.tau, least=0, most=1)
        check_number("beta", self.beta, least=0, below=1)
        check_number("eps", self.eps, least=0)

    def init(self, count: int) -> dict[str, Tensor]:
        return {"squares": torch.zeros(count), "steps": torch.zeros(count)}

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        squares = gram.diagonal(dim1=-2, dim2=-1)
        scales, learnt = self._scales(squares, memory)
        main = inputs.index(self.main)
        normalized = gram * scales[..., :, None] * scales[..., None, :]
        order = [main, *(k for k in range(gram.shape[-1]) if k != main)]
        ordered = normalized[..., order, :][..., :, order]
        taus = inputs.numbers(self.tau, gram)[order[1:]]
        demanded = taus * ordered.diagonal(dim1=-2, dim2=-1)[..., 1:]
        weights = torch.empty_like(squares)
        weights[..., order], _ = least_distance(ordered, demanded)
        alone = torch.zeros_like(weights)
        alone[..., main] = 1
        # A zero direction meets a positive constraint only by rounding error.
        cannot = (_squared_norm(weights, normalized) == 0) & (demanded > 0).any(-1)
        weights = torch.where(cannot[..., None], alone, weights)
        factor = (squares[..., main] * reciprocal(_squared_norm(weights, normalized))).sqrt()
        return weights * scales * factor[..., None], learnt

    def _scales(
        self, squares: Float[Tensor, "*batch K"], memory: Remembered
    ) -> tuple[Float[Tensor, "*batch K"], Remembered]:
        """1/√(v̂ + ε), 0 for an objective whose gradient has always been 0; and the new memory."""
        steps = memory["steps"] + 1
        average = self.beta * memory["squares"] + (1 - self.beta) * squares
        roots = (average / (1 - self.beta**steps) + self.eps).sqrt()
        return reciprocal(roots), {"squares": average, "steps": steps}


def _squared_norm(
    weights: Float[Tensor, "*batch K"], gram: Float[Tensor, "*batch K K"]
) -> Float[Tensor, "*batch"]:
    """The direction's squared norm; 0 if that is rounding error."""
    square = (weights[..., None, :] @ gram @ weights[..., :, None])[..., 0, 0]
    whole = (weights.abs() * gram.diagonal(dim1=-2, dim2=-1).sqrt()).sum(-1).square()
    return torch.where(square <= _PRECISION * whole, 0.0, square)
