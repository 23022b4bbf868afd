"""Penalty-based boundary intersection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_numbers
from gradkit.weighting.loss_weighting import LossWeighting
from gradkit.weighting.ray import check_ray, divided, no_ray


@dataclass(eq=False)
class PBI(LossWeighting):
    """Penalty-based boundary intersection ([Zhang & Li, 2007](https://ieeexplore.ieee.org/document/4358754)).

    The distance of the losses from the ideal point z along the ray of a preference p, and θ times
    their distance from the ray. With f = L − z and u = p/‖p‖:

        d₁ = ⟨f, u⟩,   d₂ = ‖f − d₁u‖
        step on ∇ (d₁ + θ·d₂),        so that w = u + θ·(f − d₁u)/d₂

    Part of MOEA/D, an evolutionary method, where it scores candidates. A large θ leads to the point
    of the Pareto front on the ray, also where the front is concave and no weighted sum ends. On the
    way there, an objective whose loss is too small for the ray may have a negative weight, so that
    its loss rises. On the ray itself d₂ has no gradient, and w = u; the weights jump from one side
    of the ray to the other, so that steps of constant size oscillate about it. With the default θ
    this cost most of the progress where it was measured (docs/alignment.md).

    The formula is MOEA/D's for minimisation, and TorchJD's, which adds 1e-12 to d₂². The paper
    itself was not available.

    Weights do not change if L and z are multiplied by s. Cost: none beyond the gradients. State:
    none. To try another preference in each step, assign `preference`.

    Args:
        preference: p, numbers ≥ 0 in order or by name, not all 0; only their ratios count. The
            default is the same for all.
        theta: θ ≥ 0. The default is reported to be that of the paper's experiments.
        ideal: z, the lowest values that losses can have: a number for all, a list with one for each
            objective, or a mapping from their names.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.PBI(theta=0.5)(torch.tensor([1.0, 3.0]))  # (1, 1)/√2 + 0.5·(-1, 1)/√2
        tensor([0.3536, 1.0607])
        >>> gk.PBI([1.0, 3.0])(torch.tensor([1.0, 3.0]))  # on the ray
        tensor([0.3162, 0.9487])
    """

    preference: Preference | None = None
    theta: float = 5.0
    ideal: float | Preference = 0.0

    def __post_init__(self) -> None:
        check_ray(self.preference)
        check_number("theta", self.theta, least=0)
        check_numbers("ideal", self.ideal)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        check_ray(self.preference)  # which may have been assigned since
        losses = inputs.needed_losses(self)
        f = losses - inputs.numbers(self.ideal, losses)
        p = inputs.shares(self.preference, losses)
        u = p / p.norm()
        across = f - (f * u).sum() * u
        rounding = 10 * len(f) * torch.finfo(f.dtype).eps * f.norm()
        d2 = across.norm()
        return u + self.theta * divided(across, d2 * ~(d2 <= rounding)), memory

    def objection(self, losses: Mapping[str, float]) -> str | None:
        return no_ray(self, self.preference, losses)
