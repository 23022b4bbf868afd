"""Weights updated by projected gradient steps, on independent samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.simplex import project_onto_simplex


@dataclass(eq=False)
class MoDo(GramRule):
    """Multi-objective gradient with double sampling ([Chen et al., JMLR 2024](https://arxiv.org/abs/2305.20057)).

        λ_{t+1} = Π(λ_t − γ·(G λ_t + ρ·λ_t))        Π onto the simplex, λ_0 = 1/K
        d = Σ λ_{t+1,i} g_i

    One projected gradient step per optimizer step tracks MGDA's weights. The paper's G is J₁J₂ᵀ of
    two independent batches, which makes λ's steps unbiased, and the authors' d sums both batches.
    In `wrap`, G is the Gram matrix of the present batch, which makes λ's steps biased. Outside
    `wrap`, `rule.weights(gram)` also accepts J₁J₂ᵀ.

    Not homogeneous: γ is a step in units of 1/‖g‖². Cost: none beyond the gradients. State: λ.

    Args:
        gamma: γ > 0, the step size of the weights.
        rho: ρ ≥ 0, an ℓ₂ penalty that pulls the weights towards 1/K.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `gamma` or `rho` is not a number.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> rule = gk.MoDo(gamma=0.01, rho=0.0)
        >>> rule.weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.5500, 0.4500])
    """

    gamma: float = 0.1
    rho: float = 0.1
    scope: Scope = "global"
    degree = None
    needs_symmetry = False

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, above=0)
        check_number("rho", self.rho, least=0)

    def init(self, count: int) -> dict[str, Tensor]:
        return {"weights": torch.full((count,), 1 / count)}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        weights, learnt = descended(inputs.gram, memory["weights"], self.gamma, self.rho)
        return weights, {"weights": learnt}


def descended(
    gram: Float[Tensor, "*batch K K"], weights: Float[Tensor, "*batch K"], gamma: float, rho: float
) -> tuple[Float[Tensor, "*batch K"], Float[Tensor, "*batch K"]]:
    """The weights after a projected gradient step.

    Args:
        gram: G, of the objectives that take part.
        weights: Their weights, which sum to less than 1 if others take no part.
        gamma: γ.
        rho: ρ.

    Returns:
        Weights of sum 1, and the same with the sum of the old weights, so that objectives that take
        no part keep their share.

    Examples:
        >>> gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]])
        >>> descended(gram, torch.tensor([0.25, 0.25]), gamma=0.01, rho=0.0)
        (tensor([0.5500, 0.4500]), tensor([0.2750, 0.2250]))
    """
    share = weights.sum(-1, keepdim=True)
    share = torch.where(share > 0, share, torch.ones_like(share))
    old = weights / share
    slope = (gram @ old[..., None])[..., 0] + rho * old
    new = project_onto_simplex(old - gamma * slope)
    return new, new * share
