"""What an engine offers for the length of one step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from gradkit.core.displacement import Displacement
from gradkit.engines.backward import Receivers


@runtime_checkable
class Session(Protocol):
    """One engine during one step.

    The weights and buffers may differ from the live ones inside `displaced` and `running`; after
    either, whatever happened, the weights are as before.
    """

    def displaced(self, at: Displacement | None) -> AbstractContextManager[Sequence[Tensor]]:
        """The leaves to differentiate with respect to, at the weights plus `at`."""

    def running(self, *, keep_buffers: bool) -> AbstractContextManager[None]:
        """A context, inside `displaced`, for a closure and its gradients.

        Changes to buffers count if `keep_buffers`, and are undone otherwise.
        """

    def differentiate(
        self,
        loss: Tensor,
        leaves: Sequence[Tensor],
        *,
        retain_graph: bool,
        receivers: Receivers,
    ) -> list[Tensor | None]:
        """The loss's gradients with respect to the leaves.

        Args:
            loss: A scalar with its graph.
            leaves: The leaves.
            retain_graph: Whether the graph is kept.
            receivers: What may take a leaf's gradient while the backward pass goes on, where the
                leaves are the engine's own.

        Returns:
            One per leaf; None for one that the loss does not reach, or that has been received.
        """

    def collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Take the gradients that a closure's own backward left; None if it ran none."""

    def commit(self) -> None:
        """Make the kept changes to buffers the model's."""

    def rollback(self) -> None:
        """Put weights and buffers back as they were when the session began."""
