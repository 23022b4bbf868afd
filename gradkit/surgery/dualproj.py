"""The mean gradient, projected so that it conflicts with none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_preference
from gradkit.surgery.rule import GramRule
from gradkit.surgery.solvers.dual_cone import project_onto_dual_cone


@dataclass(eq=False)
class DualProj(GramRule):
    """The mean gradient projected onto the dual cone of all ([Lopez-Paz & Ranzato, NeurIPS 2017](https://arxiv.org/abs/1706.08840)).

        d = π(Σ_i p_i g_i),   π onto {d : ⟨d, g_j⟩ ≥ 0 for all j}

    In terms of weights, d = vᵀJ with v = argmin vᵀGv over v ≥ p. Gradient episodic memory (GEM)
    projects the present task's gradient in this way: p = 1 for it, 0 for the earlier tasks, and
    reg = 0. The name and the mean are those of [Quinton & Rey,
    2024](https://arxiv.org/abs/2406.16232). With reg = 0 the result conflicts with no gradient;
    otherwise ⟨d, g_j⟩ ≥ −reg·trace(G)·w_j, w being the weights.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        preference: p, one number ≥ 0 for each objective, in order or by name; 1/K each by default.
        reg: The projection is computed with G/trace(G) + reg·I, which makes it unique. With 0 it is
            one of the solutions. (TorchJD does not project where trace(G) < 1e-4, its `norm_eps`.)
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `reg` is not a number, or `preference` no sequence or mapping of numbers.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.DualProj()(jacobian)
        tensor([0.5563, 1.1109, 1.1109])
        >>> gk.DualProj(reg=0.0)(jacobian)
        tensor([0.5556, 1.1111, 1.1111])
    """

    preference: Preference | None = None
    reg: float = 1e-4
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("reg", self.reg, least=0)
        check_preference("preference", self.preference, least=0)

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        bounds = inputs.shares(self.preference, gram).expand(gram.shape[:-1])
        projected = project_onto_dual_cone(regularized(gram, self.reg), bounds[..., None, :])
        return projected[..., 0, :], memory


def regularized(gram: Float[Tensor, "*batch K K"], reg: float) -> Float[Tensor, "*batch K K"]:
    """G/trace(G) + reg·I; reg·I if all gradients are 0.

    Examples:
        >>> regularized(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5)
        tensor([[1.2500, 0.2500],
                [0.2500, 0.7500]])
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram / torch.where(trace == 0, torch.ones_like(trace), trace) + reg * identity
