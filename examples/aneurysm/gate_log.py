"""What a gated teacher did in each step of a training."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import gradkit as gk

COLUMNS = ("cosine", "gate_cosine", "gate", "decay")


class GateLog:
    """Cosine of the gradients of source and target, gate and decay of the teacher, step by step.

    It follows an optimizer whose step has the objectives "source" and "target". The first cosine is
    that of the gradients, the second what the gate compares; where there is no gate or teacher,
    entries are NaN. Values stay on the device until they are asked for.

    Args:
        optimizer: Whose steps to follow.
    """

    def __init__(self, optimizer: gk.GradientOptimizer) -> None:
        self._rows: list[Tensor] = []
        optimizer.register_step_post_hook(self._record)

    def _record(self, optimizer: Any, arguments: Any, options: Any) -> None:
        step = optimizer.last_step
        if step is None or not {"source", "target"} <= set(step.names):
            return
        missing = torch.full_like(step.losses[0], torch.nan)
        values = (step.cosine("source", "target"), step.gate_cosine, step.gate, step.decay)
        row = [missing if value is None else value.to(missing) for value in values]
        self._rows.append(torch.stack(row))

    @property
    def history(self) -> Float[Tensor, "steps 4"]:
        """A row for each step: the columns are `COLUMNS`."""
        return torch.stack(self._rows).cpu() if self._rows else torch.empty(0, len(COLUMNS))

    def state_dict(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes over a history."""
        self._rows = list(state_dict["history"])
