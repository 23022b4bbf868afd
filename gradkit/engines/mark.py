"""Whether a closure adds to gradients from before the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkit.core.flat import Layout
from gradkit.core.ranks import local


class Mark:
    """NaNs in a leaf's `.grad`, where gradients were accumulated before the step.

    They show whether a closure that calls backward clears gradients first, as torch's do, or adds
    to what is there, which is not there any more.
    """

    def __init__(self, layout: Layout, accumulated: Sequence[int]) -> None:
        """Begin.

        Args:
            layout: The parameters.
            accumulated: Those whose `.grad` held something before the step, if any did.
        """
        self._shards = layout.shards
        # The smallest takes the least time.
        self._where = min(accumulated, key=lambda t: layout.parameters[t].numel(), default=None)
        self._value: Tensor | None = None

    def place(self, leaves: Sequence[Tensor]) -> None:
        """Leave it, before a closure runs."""
        if self._where is not None:
            leaf = leaves[self._where]
            self._value = leaf.grad = torch.full_like(leaf.detach(), torch.nan)

    def take(self, leaves: Sequence[Tensor], name: str, *, several: bool) -> None:
        """Take it away again, once the closure has run.

        Args:
            leaves: The leaves.
            name: The objective.
            several: Whether the closure returned several losses; a backward of its own beside them
                is an error by itself.

        Raises:
            RuntimeError: If the closure added gradients to it.
        """
        mark, self._value = self._value, None
        if mark is None or self._where is None or leaves[self._where].grad is not mark:
            return
        others = [leaf for t, leaf in enumerate(leaves) if t != self._where]
        elsewhere = any(leaf.grad is not None for leaf in others)
        added = mark._version > 0 or elsewhere
        remains = local(mark).isnan().any().float()
        if self._shards is not None:  # a rank may hold no part of it
            self._shards.add_up(remains)
        if added and not several and bool(remains):
            raise RuntimeError(
                f"objective {name!r} calls backward without clearing gradients, and there are "
                "some from before the step, which it cannot add to; pass a generator that yields "
                "the loss of each micro-batch, or call zero_grad() in the closure"
            )
        # zero_grad(set_to_none=False) writes once; a backward would have written again.
        if not added or (not elsewhere and mark._version == 1 and not local(mark).any()):
            leaves[self._where].grad = None

    def forget(self) -> None:
        """Let go of it, whether or not it was taken."""
        self._value = None
