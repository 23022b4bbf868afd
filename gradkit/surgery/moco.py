"""MGDA's weights by gradient steps, on running means of the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.gradients import Gradients
from gradkit.core.gram import at_least_single, block_spans, block_width
from gradkit.surgery.inputs import Remembered, RuleInputs
from gradkit.surgery.modo import descended
from gradkit.surgery.vectors import VectorRule, with_rows


@dataclass(eq=False)
class MoCo(VectorRule):
    """Multi-objective gradient correction (Fernando et al., ICLR 2023).

    From [Mitigating Gradient Bias in Multi-objective
    Learning](https://openreview.net/forum?id=dLAYGdKTi2), in the order of the authors' code:

        y_i ← y_i − β·(y_i − g_i)                         from y_i = 0
        λ   ← Π(λ − γ·(Y·Yᵀ·λ + ρ·λ))                     Π onto the simplex, from λ = 1/K
        d   = Σ_i λ_i·y_i

    The weights of single batches are biased, since they follow the batch's noise; y_i tracks the
    gradient of all data. Since it starts at 0, the first directions are small: β·g_i in the first
    step.

    The paper also lets β and γ fall from step to step; the authors' code keeps them. The defaults
    are the code's, which can also divide y_i by its norm or loss. LibMTL's `MoCo` is another rule:
    gradients are scaled to the norms L_i, β and γ fall as 0.5/√t and 0.1/√t, and Π is a softmax.

    In `wrap` the objectives' rows become the y_i, so that another rule can follow, and the records
    hold their inner products. A parameter that no objective reaches in a step is not moved in it.

    Not homogeneous: γ is a step in units of 1/‖y‖².

    Cost: none beyond the gradients. Memory: two flat vectors for each objective, the old and the
    new y; with observers, one more set of rows. State: y, one flat vector for each objective; λ. An
    objective that takes no part in a step keeps its y and its share of the weight.

    Args:
        beta: β in (0, 1], how fast y follows; 1 is `MoDo` on one batch.
        gamma: γ > 0, the step size of the weights.
        rho: ρ ≥ 0, an ℓ₂ penalty that pulls the weights towards 1/K.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> rule = gk.MoCo(beta=0.5, gamma=0.01, rho=0.0)
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> rule(jacobian)  # λ = (0.5125, 0.4875), of y = jacobian / 2
        tensor([0.4375, 0.5000, 0.5000])
        >>> rule(jacobian)  # y = 3/4 of jacobian
        tensor([0.4717, 0.7500, 0.7500])
    """

    beta: float = 0.1
    gamma: float = 0.1
    rho: float = 0.1

    degree = None
    remembers = "tracked"

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0, most=1)
        check_number("gamma", self.gamma, above=0)
        check_number("rho", self.rho, least=0)

    def init(self, count: int) -> dict[str, Tensor]:
        return {"weights": torch.full((count,), 1 / count, dtype=torch.float64)}

    def renew(
        self,
        row: Float[Tensor, " P"],
        weight: Float[Tensor, ""],
        loss: Float[Tensor, ""],
        old: Float[Tensor, " P"] | None,
        out: Float[Tensor, " P"],
        memory: Mapping[str, Float[Tensor, ""]],
    ) -> None:
        dtype = at_least_single(row.dtype)
        factor = (self.beta * weight).to(dtype)
        for start, stop in block_spans(0, len(row), block_width(2, row.device)):
            new = row[start:stop].to(dtype) * factor
            if old is not None:
                new.add_(old[start:stop].to(dtype), alpha=1 - self.beta)
            out[start:stop] = new

    def respond(
        self,
        gradients: Gradients,
        active: list[int],
        renewed: Float[Tensor, "K P"],
        learned: Float[Tensor, " K"] | None,
        inputs: RuleInputs,
        memory: Remembered,
    ) -> tuple[Gradients, Remembered]:
        tracked = gradients.replace(rows=with_rows(gradients, active, renewed))
        gram = tracked.gram()[active][:, active]
        found, learnt = descended(gram, memory["weights"].to(gram), self.gamma, self.rho)
        weights = torch.zeros_like(gradients.weights)
        weights[active] = found.to(weights)
        return tracked.replace(weights=weights), {"weights": learnt}
