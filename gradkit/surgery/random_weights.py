"""Weights drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import own_generator
from gradkit.surgery.host import uploaded
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule


@dataclass(eq=False)
class RandomWeights(GramRule):
    """Random weighting ([Lin et al., TMLR 2022](https://arxiv.org/abs/2111.10603)).

    The baseline for methods that choose weights. In each step:

        z ~ N(0, 1)^K
        d = Σ_i softmax(z)_i·g_i

    The paper weights losses, which is the same for the gradients of one set of parameters. Of the
    paper's distributions this is the normal one.

    Homogeneous of degree 1, for a fixed draw. Cost: none beyond the gradients. State: the
    generator.

    Args:
        generator: A CPU generator for z; by default a new one with seed 0, the same in
            every process.

    Raises:
        TypeError: If `generator` is not a generator.
        ValueError: If it is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> weights = gk.RandomWeights().weights(torch.eye(3, dtype=torch.float64))
        >>> round(weights.sum().item(), 12), bool((weights > 0).all())
        (1.0, True)
    """

    needs_gram = False
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.generator = own_generator(self.generator)

    def draw(self, count: int) -> Float[Tensor, " K"]:
        """The numbers z, one for each objective."""
        return torch.randn(count, generator=self.generator, dtype=torch.float64, device="cpu")

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        return uploaded(inputs.draws.softmax(0), gram).expand(gram.shape[:-1]), memory
