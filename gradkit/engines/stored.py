"""The innermost oracle of a step without a closure."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.ranks import ALONE, Ranks
from gradkit.engines.rows import Rows


class StoredGradients:
    """The innermost oracle of a step without a closure: the gradients in `.grad`.

    Args:
        name: The objective's name.
        grads: The gradients, one per parameter.
        loss: The loss that a closure reported; None if there is none.
        context: The step's context.
        ranks: The ranks that step together.

    Attributes:
        first_losses: The loss, by the objective's name.
        unmeasured: None.
        without_loss: The objectives without a loss.
        measured: The loss and the squared norm of the gradient.

    Raises:
        NoGradientError: If all gradients are None.
    """

    def __init__(
        self,
        name: str,
        grads: Sequence[Tensor | None],
        loss: Tensor | None,
        context: Context,
        ranks: Ranks,
    ) -> None:
        context.names = (name,)
        rows = Rows((name,), context.layout.parameters, context)
        rows.add_loss(name, loss)
        rows.add(name, grads)
        ranks.check_clear(1)
        reduced = ranks.replicas or not ranks.averages  # DDP has already averaged them
        averages = not reduced
        rows.finish(ALONE if reduced else ranks, 0, None, context.ascended, averages=averages)
        self._gradients = rows.gradients()
        self.first_losses = {name: rows.loss(name)}
        context.without_loss |= rows.without_loss()
        if context.ascends_everywhere:
            rows.negate_losses()
        self.unmeasured: dict[str, Tensor] = {}
        self.without_loss = context.without_loss
        self.measured = [self._gradients.measured()]

    def evaluate(
        self,
        at: Point | None = None,
        only: Container[str] | None = None,
    ) -> Gradients:
        """The stored gradients.

        Raises:
            RuntimeError: If `at` is given, since there are no gradients at other weights.
        """
        if at is not None:
            raise RuntimeError(
                "a transform of this optimizer evaluates the loss at other weights too: "
                "pass step() a closure that returns the loss (and a GradScaler as scaler= to "
                "gk.wrap(), instead of calling scaler.step(optimizer))"
            )
        return self._gradients
