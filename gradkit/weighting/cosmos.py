"""A weighted sum of losses, and their angle to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed
from gradkit.weighting.loss_weighting import LossWeighting
from gradkit.weighting.ray import check_ray, divided, no_ray


@dataclass(eq=False)
class COSMOS(LossWeighting):
    """The objective of COSMOS ([Ruchte & Grabocka, ICDM 2021](https://arxiv.org/abs/2103.13392)).

        step on ∇ (⟨r, L⟩ − λ·cos(r, L))
        w = r − λ/‖L‖·(r/‖r‖ − cos(r, L)·L/‖L‖)

    The cosine draws the losses to the ray of the preference r, for which the weighted sum alone
    has no need: it makes one model cover the Pareto front. For that COSMOS draws r in each step
    (Dirichlet, α from 0.1 to 1.2 in the authors' code) and gives it to the model as a further
    input, which is left to the user:

        r = torch.distributions.Dirichlet(torch.tensor([1.2, 1.2])).sample()
        weighting.preference = r
        optimizer.step(lambda: losses(model(torch.cat([x, r.expand(len(x), -1)], 1))))

    With a fixed r it seeks one point of the front. Weights may be negative, where the losses are
    small beside λ and far from the ray. Losses that are all 0 have no cosine: then w = r.

    Not homogeneous: losses and λ multiplied by s leave the weights as they are. Cost: none beyond
    the gradients. State: none.

    Args:
        preference: r, numbers ≥ 0 in order or by name, not all 0; 1/K each by default. They are
            not normalised; the authors' sum to 1.
        lmbda: λ ≥ 0. The default is the authors' for MultiMNIST; elsewhere they have 0.01 to 8.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> weighting = gk.COSMOS([0.6, 0.8], lmbda=5.0)
        >>> weighting(torch.tensor([4.0, 3.0]))  # (0.6, 0.8) - (-0.168, 0.224)
        tensor([0.7680, 0.5760])
        >>> weighting(torch.tensor([3.0, 4.0]))  # on the ray
        tensor([0.6000, 0.8000])
    """

    preference: Preference | None = None
    lmbda: float = 2.0

    def __post_init__(self) -> None:
        check_ray(self.preference)
        check_number("lmbda", self.lmbda, least=0)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        check_ray(self.preference)  # which may have been assigned since
        losses = inputs.needed_losses(self)
        r = inputs.shares(self.preference, losses)
        ray, size = r / r.norm(), losses.norm()
        unit = divided(losses, size)
        cosine = (ray * unit).sum()
        return r - self.lmbda * divided(ray - cosine * unit, size), memory

    def objection(self, losses: Mapping[str, float]) -> str | None:
        return no_ray(self, self.preference, losses)
