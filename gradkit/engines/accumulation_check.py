"""Detection of closures that accumulate gradients across steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkit.core.flat import Layout
from gradkit.core.ranks import local


class AccumulationCheck:
    """Detects closures that accumulate into `.grad`, which the step has cleared.

    Before a closure runs, the `.grad` of one leaf is set to NaNs. A closure that clears gradients
    before it calls backward, as torch's do, removes them; one that accumulates leaves NaNs behind.

    Args:
        layout: Where each parameter lies in the flat vector.
        accumulated: The positions of parameters whose `.grad` was set before the step.
    """

    def __init__(self, layout: Layout, accumulated: Sequence[int]) -> None:
        self._shards = layout.shards
        # The smallest takes the least time.
        self._where = min(accumulated, key=lambda t: layout.parameters[t].numel(), default=None)
        self._sentinel: Tensor | None = None

    def place(self, leaves: Sequence[Tensor]) -> None:
        """Set the leaf's `.grad` to NaNs, before a closure runs."""
        if self._where is not None:
            leaf = leaves[self._where]
            self._sentinel = leaf.grad = torch.full_like(leaf.detach(), torch.nan)

    def check(self, leaves: Sequence[Tensor], name: str, *, several: bool) -> None:
        """Look for the NaNs once the closure has run, and remove them.

        Args:
            leaves: The leaves.
            name: The objective.
            several: Whether the closure returned several losses. A backward pass of its own is then
                an error that is reported elsewhere.

        Raises:
            RuntimeError: If the closure accumulated gradients.
        """
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is None or self._where is None or leaves[self._where].grad is not sentinel:
            return
        others = [leaf for t, leaf in enumerate(leaves) if t != self._where]
        elsewhere = any(leaf.grad is not None for leaf in others)
        added = sentinel._version > 0 or elsewhere
        remains = local(sentinel).isnan().any().float()
        if self._shards is not None:  # a rank may hold no part of it
            self._shards.add_up(remains)
        if added and not several and bool(remains):
            raise RuntimeError(
                f"objective {name!r} calls backward without clearing gradients, and there are "
                "some from before the step, which it cannot add to; pass a generator that yields "
                "the loss of each micro-batch, or call zero_grad() in the closure"
            )
        # zero_grad(set_to_none=False) writes once; a backward would have written again.
        if not added or (not elsewhere and sentinel._version == 1 and not local(sentinel).any()):
            leaves[self._where].grad = None

    def forget(self) -> None:
        """Drop the reference to the NaNs, whether or not they were checked."""
        self._sentinel = None
