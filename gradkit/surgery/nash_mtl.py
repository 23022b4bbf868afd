"""The Nash bargaining solution between objectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.fair import fair_weights


@dataclass(eq=False)
class NashMTL(GramRule):
    """Multi-task learning as a bargaining game ([Navon et al., ICML 2022](https://arxiv.org/abs/2202.01017)).

        G·a = 1/a,  a > 0        d = Σ a_i g_i

    Each objective gains the same, ⟨a_i g_i, d⟩ = 1, so that ‖d‖ = √K whatever the gradients'
    norms. The authors approximate a by a sequence of convex programs, starting from the step
    before, from the gradients of shared parameters, and multiply losses by it, so that heads are
    weighted, too. Here a is the minimum of ½aᵀGa − Σ ln a_i, found by Newton's method. Their
    `update_weights_every=k` is `gk.Every(k, gk.NashMTL())`.

    If the gradients are Pareto-stationary there is no solution, and a grows without bound near such
    a point: then G's cosines are regularised (see `fair_weights`). A zero gradient has weight 0.

    Homogeneous of degree 0: the direction does not depend on the gradients' scale. Cost: none
    beyond the gradients. State: none.

    Args:
        max_norm: Clip ‖d‖ to this value, as the authors' code does (to 1); None does not clip.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `max_norm` is not a number or None.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.NashMTL()(jacobian)
        tensor([0.0766, 0.9985, 0.9985])
        >>> gk.NashMTL(max_norm=1.0)(jacobian)
        tensor([0.0542, 0.7061, 0.7061])
    """

    max_norm: float | None = None
    scope: Scope = "global"
    degree = 0.0

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm)
            if self.max_norm <= 0:
                raise ValueError(
                    f"max_norm is {self.max_norm}; it must be positive, or None for no clipping"
                )

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        weights = fair_weights(gram)
        if self.max_norm is None:
            return weights, memory
        square = (weights[..., None, :] @ gram @ weights[..., :, None])[..., 0, :]
        norm = square.clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
        return weights * (self.max_norm / norm).clamp(max=1), memory
