"""What an adapter asks of its parts: objectives, predictors, restores and transforms.

A part is any callable. Beyond being called it may have some of these methods, and an adapter calls
those that it has:

- `attach(adapter)`: once, when the adapter is made, to reach its model, teacher and other parts;
- `check_images(images)`: before anything runs for a batch; it may raise;
- `begin_batch(images)`: once per batch, before the first step and without gradients;
- `begin_step(images)`: before each optimizer step, which may evaluate an objective several times;
- `state_dict()`, `load_state_dict(state)`: the state, which is saved and reset with the adapter;
- `generator`, a `torch.Generator` from which it draws: put back after a step that is skipped, as a
  transform's is. It is saved only if the state includes it;
- `facts`, a dict: what the part did for the last batch (`Adapter.facts`). An attribute is emptied
  before each batch. Statistics may have it, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from gradkit.tta.adapter import Adapter

Objective = Callable[[nn.Module, Tensor], Tensor | None]
"""From model and images to a loss, or to None where it leaves nothing to step on."""

Predictor = Callable[[nn.Module, Tensor], Tensor]
"""From model and images to logits, without gradients."""

Restore = Callable[["Adapter"], None]
"""Called after each applied step; it may move the weights back."""

Part = TypeVar("Part")


@runtime_checkable
class Stateful(Protocol):
    """A part with a state, such as a random number generator."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If it does not fit.
        """


class KeptLogits:
    """A predictor: the logits that the objective "loss" has kept for the batch.

    Args:
        name: The objective's attribute that holds them.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def attach(self, adapter: Adapter) -> None:
        self.objective = adapter.objectives["loss"]

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = getattr(self.objective, self.name)
        return logits


def own(part: Part) -> Part:
    """A copy of a part that keeps something, so that adapters share nothing; others unchanged."""
    keeps = isinstance(part, Stateful) or hasattr(part, "attach") or hasattr(part, "begin_step")
    return copy.deepcopy(part) if keeps else part


def tell(parts: Iterable[object], method: str, argument: object) -> None:
    """Call a method of the parts that have it."""
    for part in parts:
        call = getattr(part, method, None)
        if call is not None:
            call(argument)
