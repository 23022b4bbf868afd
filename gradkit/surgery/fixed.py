"""Rules whose weights do not depend on the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule


@dataclass(eq=False)
class Sum(GramRule):
    """The sum of the gradients: the gradient of the sum of the losses.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.Sum()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([2., 2., 2.])
    """

    joins = False
    needs_several = False
    needs_gram = False

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        return gram.new_ones(gram.shape[:-1]), memory


@dataclass(eq=False)
class Mean(GramRule):
    """The mean of the gradients.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.Mean()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([1., 1., 1.])
    """

    needs_gram = False
    needs_several = False

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        return gram.new_full(gram.shape[:-1], 1 / gram.shape[-1]), memory
