"""Balancing objectives by the logarithms of their losses and the norms of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.gradients import Gradients
from gradkit.core.gram import at_least_single, block_spans, block_width
from gradkit.surgery.inputs import Remembered, RuleInputs, too_low
from gradkit.surgery.vectors import VectorRule, with_rows


@dataclass(eq=False)
class DBMTL(VectorRule):
    """Balance losses and gradients ([Lin et al., 2023](https://arxiv.org/abs/2308.12029)).

    Dual-Balancing for Multi-Task Learning:

        β_t = β / t^σ                                 in an objective's step t
        ĝ_i ← β_t·ĝ_i + (1 − β_t)·∇log(L_i + ε)      from ĝ_i = 0; ∇log(L + ε) = g / (L + ε)
        α_i = max_j ‖ĝ_j‖ / ‖ĝ_i‖
        d   = Σ_i α_i·ĝ_i

    The paper's own text was not compared. β/t^σ is from LibMTL, by the same authors, which sets no
    σ. **Do not use σ = 0, a constant β, with a base optimizer that has momentum.** Example: three
    regressions on a small network, 600 steps of Adam with lr 0.01. The validation errors, as
    fractions of the variance, are 0.99, 0.11 and 0.52 with β = 0.9 and σ = 0; 0.05, 0.01 and 0.02
    with σ = 0.5; 0.04, 0.01 and 0.03 with β = 0; 0.05, 0.01 and 0.03 for the sum of the losses.

    LibMTL averages and balances the shared parameters only, and uses ∇log(L + 1e-8) unchanged for
    heads; here all optimised parameters are included. With LibMTL's choice of parameters and the
    constant β, the errors above are 0.10, 0.06 and 0.08 instead of 0.99, 0.11 and 0.52. LibMTL adds
    1e-8 to the norms; here a zero ĝ stays 0. Since ĝ starts at 0, the first directions are small. A
    loss of −ε or less has no logarithm and gives NaNs.

    In `wrap` the objectives' rows become the ĝ_i, so that another rule can follow, and the records
    hold their inner products. A parameter that no objective reaches in a step is not moved in it.

    Homogeneous of degree 1 in the gradients, for fixed losses.

    Cost: none beyond the gradients. Memory: two flat vectors for each objective, the old and the
    new ĝ; with observers, one more set of rows. State: ĝ, one flat vector for each objective; the
    number of steps that each has taken part in.

    Args:
        beta: β, at least 0 (no mean over steps) and less than 1.
        eps: ε ≥ 0.
        sigma: σ ≥ 0, how fast β falls.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian, losses = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 4.0])
        >>> gk.DBMTL(beta=0.0)(jacobian, losses)  # the norms 5/1 and 2/4 become 5
        tensor([3., 9.])
    """

    beta: float = 0.9
    eps: float = 1e-8
    sigma: float = 0.5

    remembers = "mean"
    needs_losses = True

    def __post_init__(self) -> None:
        check_number("beta", self.beta, least=0, below=1)
        check_number("sigma", self.sigma, least=0)
        check_number("eps", self.eps, least=0)

    def init(self, count: int) -> dict[str, Tensor]:
        return {"steps": torch.zeros(count, dtype=torch.float64)}

    def renew(
        self,
        row: Float[Tensor, " P"],
        weight: Float[Tensor, ""],
        loss: Float[Tensor, ""],
        old: Float[Tensor, " P"] | None,
        out: Float[Tensor, " P"],
        memory: Mapping[str, Float[Tensor, ""]],
    ) -> None:
        shifted = weight * loss + self.eps
        slope = weight / torch.where(shifted > 0, shifted, torch.full_like(shifted, torch.nan))
        beta = self.beta / (memory["steps"] + 1) ** self.sigma
        factor = (1 - beta) * slope
        dtype = at_least_single(row.dtype)
        for start, stop in block_spans(0, len(row), block_width(2, row.device)):
            new = row[start:stop].to(dtype) * factor.to(dtype)
            if old is not None:
                new.addcmul_(old[start:stop].to(dtype), beta.to(dtype))
            out[start:stop] = new

    def objection(self, losses: Mapping[str, float]) -> str | None:
        return too_low(self, losses, -self.eps, f"losses above -{self.eps:g}")

    def respond(
        self,
        gradients: Gradients,
        active: list[int],
        renewed: Float[Tensor, "K P"],
        learned: Float[Tensor, " K"] | None,
        inputs: RuleInputs,
        memory: Remembered,
    ) -> tuple[Gradients, Remembered]:
        balanced = gradients.replace(rows=with_rows(gradients, active, renewed))
        norms = balanced.gram().diagonal()[active].sqrt()
        scales = norms.max() / torch.where(norms == 0, torch.ones_like(norms), norms)
        weights = torch.zeros_like(gradients.weights)
        weights[active] = scales.to(weights)
        return balanced.replace(weights=weights), {"steps": memory["steps"] + 1}
