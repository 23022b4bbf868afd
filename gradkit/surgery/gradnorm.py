"""Weights that give the objectives' gradients the norms that balance training rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule

# Adam's, as its authors set them.
_BETAS = (0.9, 0.999)


@dataclass(eq=False)
class GradNorm(GramRule):
    """Learn weights that balance training rates ([Chen et al., 2018](https://arxiv.org/abs/1711.02257)).

    Algorithm 1, for weights w of sum K that start at 1:

        d    = Σ_i w_i·g_i
        G_i  = ‖w_i·g_i‖,   Ḡ = 1/K·Σ_i G_i
        r_i  = (L_i / L_i(0)) / (1/K·Σ_j L_j / L_j(0))
        w   ← w − Adam(∇_w Σ_i |G_i − Ḡ·r_i^α|)     the targets Ḡ·r_i^α held constant
        w   ← K·w / Σ_i w_i

    so that objectives that fall behind get larger gradients. The inner gradient has the closed form
    ∂/∂w_i = ‖g_i‖·sign(G_i − Ḡ·r_i^α). As in the paper, a step uses the weights learned in the
    steps before it, and the weights' own optimizer is Adam with learning rate 0.025; here it has no
    ε, so that the gradients' scale does not matter. The paper measures G in the last layer that
    objectives share; here it is measured in all optimised parameters (see `scope`). The paper
    weights whole losses, heads included; with scope "shared" heads are not weighted.

    Cases that the algorithm does not define: a weight that would become negative is set to 0, from
    where it can rise again. An objective whose first loss is not positive, or whose loss is
    negative, has L_i / L_i(0) = 1.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: for each objective its weight,
    its first loss, and Adam's two moments and step count. An objective that appears later starts
    with a weight of 1; its first loss is the one at that step.

    Args:
        alpha: α ≥ 0, how strongly training rates are balanced; 0 makes norms equal.
        lr: The weights' own learning rate.
        scope: The parameters over which norms are computed: all ("global"), those "shared" by
            objectives, each "group", or each "tensor". Each group or tensor has its own weights.

    Raises:
        TypeError: If `alpha` or `lr` is not a number.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> rule = gk.GradNorm()
        >>> jacobian, losses = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0])
        >>> rule(jacobian, losses)
        tensor([3., 5.])
        >>> rule(jacobian, losses)  # the longer gradient now has the weight 0.975
        tensor([2.9250, 4.9250])
    """

    alpha: float = 1.5
    lr: float = 0.025
    scope: Scope = "global"

    needs_losses = True

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, least=0)
        check_number("lr", self.lr, least=0)

    def init(self, count: int) -> dict[str, Tensor]:
        keys = ("first_losses", "steps", "first_moments", "second_moments")
        zeros = torch.zeros(count, dtype=torch.float64)
        return {"weights": zeros + 1, **dict.fromkeys(keys, zeros)}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        count = gram.shape[-1]
        weights = _of_sum(count, memory["weights"])
        losses = inputs.needed_losses(self).to(weights)
        norms = gram.diagonal(dim1=-2, dim2=-1).to(weights).sqrt()
        steps = memory["steps"] + 1
        first_losses = torch.where(steps == 1, losses, memory["first_losses"])
        slope = self._slope(weights, norms, losses, first_losses)
        first = torch.lerp(slope, memory["first_moments"], _BETAS[0])
        second = torch.lerp(slope.square(), memory["second_moments"], _BETAS[1])
        size = (second / (1 - _BETAS[1] ** steps)).sqrt()
        mean = first / (1 - _BETAS[0] ** steps)
        change = torch.where(size == 0, mean, mean / size)
        learnt = {
            # Objectives that take no part in this step keep their share of the weight.
            "weights": _of_sum(count, (weights - self.lr * change).clamp(min=0))
            * (memory["weights"].sum(-1, keepdim=True) / count),
            "first_losses": first_losses,
            "steps": steps,
            "first_moments": first,
            "second_moments": second,
        }
        return weights, learnt

    def _slope(
        self,
        weights: Float[Tensor, "*batch K"],
        norms: Float[Tensor, "*batch K"],
        losses: Float[Tensor, " K"],
        first_losses: Float[Tensor, "*batch K"],
    ) -> Float[Tensor, "*batch K"]:
        """The gradient of Σ|G − Ḡ·r^α| with respect to the weights."""
        unknown = (first_losses <= 0) | (losses < 0)
        ratios = torch.where(unknown, torch.ones_like(first_losses), losses / first_losses)
        mean = ratios.mean(-1, keepdim=True)
        rates = torch.where(mean == 0, torch.ones_like(ratios), ratios / mean)
        weighted = weights * norms
        excess = weighted - weighted.mean(-1, keepdim=True) * rates**self.alpha
        # The sign of a NaN would be 0.
        return norms * torch.where(excess.isnan(), excess, excess.sign())


def _of_sum(total: int, weights: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
    """The weights, scaled to this sum; equal weights if all are 0."""
    equal = (weights == 0).all(-1, keepdim=True)
    weights = torch.where(equal, torch.ones_like(weights), weights)
    return weights * (total / weights.sum(-1, keepdim=True))
