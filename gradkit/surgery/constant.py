"""Fixed weights."""

from __future__ import annotations

from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_preference
from gradkit.surgery.rule import GramRule


class Constant(GramRule):
    """A weighted sum of the gradients: the gradient of a weighted sum of the losses.

        d = Σ_i w_i·g_i

    An objective of weight 0 takes no part in the direction.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        weights: w, one finite number for each objective, in their order or by their names. A
            mapping may also hold numbers for objectives that a step does not have.

    Raises:
        TypeError: If `weights` is None, or not a sequence or mapping of numbers.
        ValueError: If a number is not finite.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.Constant([0.5, 2.0])(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([10.0000,  2.5000,  2.5000])
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> rule = gk.Constant({"task": 1.0, "penalty": 0.1})
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), rule)
        >>> _ = optimizer.step({"task": lambda: w.sum(), "penalty": lambda: -5 * w.sum()})
        >>> w.data  # 1 - (1 - 0.1 * 5)
        tensor([0.5000])
    """

    joins = False
    needs_several = False
    needs_gram = False

    # An attribute `weights` would hide the method of that name.
    def __init__(self, weights: Preference) -> None:
        if weights is None:
            raise TypeError("weights is None; pass one number for each objective")
        check_preference("weights", weights)
        self.preference = weights

    def __repr__(self) -> str:
        return f"Constant({self.preference!r})"

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        return inputs.numbers(self.preference, gram).expand(gram.shape[:-1]), memory
