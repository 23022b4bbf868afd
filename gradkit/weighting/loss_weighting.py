"""What the weightings of objectives by their losses have in common."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator
from gradkit.surgery.rule import checked_losses
from gradkit.surgery.weighing import Weighting


class LossWeighting(Weighting):
    """Weights objectives by a function of their losses, and of what it remembers of them by name.

    Usable in two ways: in `wrap`, and alone on losses, `weighting(losses) -> weights [K]`.

    In `wrap` it multiplies the objectives' weights by its own. It sees the raw losses Lᵢ of the
    objectives of nonzero weight, and no observers. It can come after rules of surgery and before
    them, but not after a transform that sets the update.

    A step learns from each objective's first loss in it (`inputs.first_losses`), which is that at
    the step's own weights: further ones, at displaced weights (SAM around this), change nothing
    that is remembered. The weights there are computed from the losses there, where they depend on
    them, and from the same random numbers and the same memory. In an optimizer only applied steps
    change what is remembered, and it is saved with the optimizer's state. Alone, each call does;
    `reset` forgets.

    Where nothing in the chain looks at single gradients, and one closure returns all losses, the
    weighted sum is back-propagated in one pass (`wrap(rows=)`).

    A closure that calls backward itself must return its loss. Where several ranks train together,
    losses are the ranks' means.
    """

    needs_rows = False
    needs_gram = False
    needs_losses = True

    @torch.no_grad()
    def __call__(self, losses: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """The weights for losses, as constants: nothing is differentiated.

        Args:
            losses: The objectives' losses.
        """
        losses = checked_losses(losses)
        wide = losses.to(accumulator(losses.device))
        return self.weigh_alone(wide.new_zeros(len(wide), len(wide)), wide).to(losses.dtype)

    def seen_losses(
        self, losses: Float[Tensor, " K"], weights: Float[Tensor, " K"]
    ) -> Float[Tensor, " K"]:
        return losses.to(weights)


def check_count(name: str, value: object, least: int) -> None:
    """Check a number of steps given by a user.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; pass a whole number of steps")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
