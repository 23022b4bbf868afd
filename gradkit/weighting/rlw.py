"""Random weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import own_generator
from gradkit.surgery.host import uploaded
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.weighting.loss_weighting import LossWeighting


@dataclass(eq=False)
class RLW(LossWeighting):
    """Random loss weighting ([Lin et al., TMLR 2022](https://arxiv.org/abs/2111.10603)).

        w̃ ~ N(0, I)                     drawn in each step
        w = softmax(w̃)
        step on ∇ Σ wᵢLᵢ

    The weights sum to 1, as in the paper and in the authors' code (LibMTL), so that their mean is
    1/K. They do not depend on the losses. This is `RandomWeights` without the objectives' own
    gradients: a baseline that other methods should surpass.

    Losses multiplied by s multiply the direction by s. Cost: none beyond the gradients. State: the
    generator.

    Args:
        generator: A CPU generator for the draws; by default a new one with seed 0, the same in
            every process.

    Raises:
        TypeError: If `generator` is not a generator.
        ValueError: If it is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> weights = gk.RLW()(torch.tensor([1.0, 2.0, 3.0]))
        >>> weights.shape, round(float(weights.sum()), 6)
        (torch.Size([3]), 1.0)
    """

    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.generator = own_generator(self.generator)

    def draw(self, count: int) -> Float[Tensor, " K"]:
        """A standard normal number for each objective."""
        return torch.randn(count, dtype=torch.float64, generator=self.generator, device="cpu")

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        return uploaded(inputs.draws.softmax(0), inputs.gram), memory
