"""The interface of engines: a session for each step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from gradkit.core.displacement import Displacement
from gradkit.engines.backward import Receivers


@runtime_checkable
class Session(Protocol):
    """An engine's session for one step.

    The weights and buffers may differ from the live ones inside `displaced` and `running`; after
    either, whatever happened, the weights are as before.
    """

    def displaced(self, at: Displacement | None) -> AbstractContextManager[Sequence[Tensor]]:
        """A context with the leaves to differentiate with respect to, at the weights plus `at`."""

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
            receivers: The functions that consume the gradients of some leaves during the backward
                pass.

        Returns:
            One gradient per leaf; None if the loss does not reach the leaf, or if the gradient has
            been received.
        """

    def collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Take the gradients that a closure's own backward pass left; None if there was none."""

    def commit(self) -> None:
        """Apply the kept changes of buffers to the model."""

    def rollback(self) -> None:
        """Restore weights and buffers to their values from the start of the session."""
