"""The base class for weightings of objectives by their losses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.gram import accumulator
from gradkit.surgery.rule import checked_losses
from gradkit.surgery.weighing import Weighting


class LossWeighting(Weighting):
    """Base class for weightings by the objectives' losses and memory.

    A weighting can be used in `wrap`, and alone on losses, `weighting(losses) -> weights [K]`.

    In `wrap` it multiplies the objectives' weights by its own. It works on the unweighted losses Lᵢ
    of the objectives of nonzero weight, without observers. It can come before or after rules of
    surgery, but not after a transform that sets the update.

    In a step the memory is updated by each objective's first loss (`inputs.first_losses`), which is
    at the step's own weights. Further losses, at displaced weights (SAM around this), do not change
    the memory. The weights at displaced points are computed from the losses there, from the same
    random numbers and from the same memory. In an optimizer only applied steps change the memory,
    which is saved with the optimizer's state. When the weighting is called alone, each call changes
    it, and `reset` clears it.

    If no transform in the chain reads single gradients, and one closure returns all losses, the
    weighted sum is back-propagated in one pass (`wrap(rows=)`).

    A closure that calls backward itself must return its loss. Where several ranks train together,
    losses are averaged over them.
    """

    needs_rows = False
    never_zero = True
    needs_gram = False
    needs_losses = True

    @torch.no_grad()
    def __call__(self, losses: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """The weights for these losses, detached.

        Args:
            losses: The objectives' losses.

        Raises:
            TypeError: If the losses are not a tensor of floating-point numbers.
            ValueError: If they are not a vector of at least one loss.
        """
        losses = checked_losses(losses)
        wide = losses.to(accumulator(losses.device))
        return self.weigh_alone(wide.new_zeros(len(wide), len(wide)), wide).to(losses.dtype)

    def seen_losses(
        self, losses: Float[Tensor, " K"], weights: Float[Tensor, " K"]
    ) -> Float[Tensor, " K"]:
        return losses.to(weights)
