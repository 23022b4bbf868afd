"""The best worst-case improvement near the mean gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.dualproj import regularized
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.conflict_averse import conflict_averse
from gradkit.surgery.solvers.dual_cone import project_onto_dual_cone

Rescale = Literal["none", "square", "linear"]


@dataclass(eq=False)
class CAGrad(GramRule):
    """Conflict-averse gradient descent ([Liu et al., NeurIPS 2021](https://arxiv.org/abs/2110.14048)).

    With g_0 the mean gradient:

        d = argmax min_i ⟨g_i, d⟩    over ‖d − g_0‖ ≤ c·‖g_0‖

    by its dual, √φ = c·‖g_0‖:

        w = argmin ⟨g_w, g_0⟩ + √φ·‖g_w‖    over w ≥ 0, Σ w_i = 1;   g_w = Σ w_i g_i
        d = g_0 + (√φ/‖g_w‖)·g_w

    For c = 0 this is the mean; for large c it approaches MGDA's direction. If the minimum has
    g_w = 0, no d in the ball improves all objectives and the dual does not determine d. Then d is
    the vector nearest to g_0 that worsens no objective: g_0 projected as in `DualProj`.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        c: The largest distance of d from the mean gradient, as a fraction of the mean's norm.
        rescale: The divisor of d: "none" 1 (the paper), "square" 1 + c² (rescale=1, the default of
            the authors' code, whose d is also K times as large), "linear" 1 + c (rescale=2).
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `c` is not a number.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.CAGrad()(jacobian)
        tensor([0.1835, 1.2041, 1.2041])
        >>> gk.CAGrad(rescale="square")(jacobian)
        tensor([0.1468, 0.9633, 0.9633])
    """

    c: float = 0.5
    rescale: Rescale = "none"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("c", self.c, least=0)
        if self.rescale not in ("none", "square", "linear"):
            raise ValueError(f"rescale is {self.rescale!r}; choose one of none, square, linear")

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        count = gram.shape[-1]
        w = conflict_averse(gram, self.c)
        mean = (gram.sum((-2, -1)).clamp(min=0) / count**2).sqrt()
        norm = (w[..., None, :] @ gram @ w[..., :, None])[..., 0, 0].clamp(min=0).sqrt()
        # Below this g_w is only rounding error: the error of its square is about 1e-7 of the
        # squared norms of float32 gradients.
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        vanishes = norm <= 3e-4 * trace.sqrt()
        factor = self.c * mean / torch.where(vanishes, torch.ones_like(norm), norm)
        weights = 1 / count + factor[..., None] * w
        if vanishes.any():
            bounds = gram.new_full((*gram.shape[:-2], 1, count), 1 / count)
            projected = project_onto_dual_cone(regularized(gram, 0.0), bounds)[..., 0, :]
            weights = torch.where(vanishes[..., None], projected, weights)
        divisors = {"none": 1.0, "square": 1 + self.c**2, "linear": 1 + self.c}
        return weights / divisors[self.rescale], memory
