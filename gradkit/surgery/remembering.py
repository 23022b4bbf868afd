"""What transforms have in common that draw numbers and remember objectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradkit.core.transform import Transform
from gradkit.surgery.given import Memory, known_objectives
from gradkit.surgery.host import uploaded


class Remembering(Transform):
    """A transform that may draw random numbers once a step, and remember each objective by name.

    In an optimizer only applied steps change what it remembers, and it is saved with the
    optimizer's state. Called alone, each call does; `reset` forgets.
    """

    def draw(self, count: int) -> Any:
        """The random numbers that one step with `count` objectives needs."""
        return None

    def initial_memory(self, count: int) -> dict[str, Tensor]:
        """What is remembered of `count` objectives before any has been seen.

        Tensors of shape [], [K] or [K, K]; of a batch of Gram matrices, for one of them.
        """
        return {}

    def reset(self) -> None:
        """Forget what is remembered of objectives."""
        for key in self.state:
            self.state[key] = None

    @property
    def state(self) -> dict[str, Any]:
        """What is remembered, and of which objectives."""
        if "_state" not in self.__dict__:
            keys = self.initial_memory(1)
            self.__dict__["_state"] = dict.fromkeys(("objectives", *keys)) if keys else {}
        state: dict[str, Any] = self.__dict__["_state"]
        return state

    def _recall(
        self,
        names: tuple[str, ...],
        like: Tensor,
        batch: Sequence[int],
        state: Mapping[str, Any],
        blocks: Sequence[str] | None = None,
        scope: str | None = None,
    ) -> Memory:
        """What is remembered of these objectives, in the dtype and on the device of `like`."""
        with torch.device("cpu"):  # whatever the default device is
            fresh = self.initial_memory(len(known_objectives(state, names)))
        fresh = {key: uploaded(value, like) for key, value in fresh.items()}
        return Memory(self, state, names, fresh, batch, blocks, scope)

    def belong_to(self, optimizer: object) -> None:
        super().belong_to(optimizer)
        # Calls alone have numbered the objectives; an optimizer names them.
        if self.__dict__.pop("_learnt_alone", False):
            self.reset()

    @contextmanager
    def _called_alone(self) -> Iterator[dict[str, Any]]:
        """A call outside of a step: yields what such calls remember, to be brought up to date.

        Where there is an optimizer, whose steps change what is remembered, the call begins anew and
        leaves no trace.
        """
        owned = self._owner() is not None
        generator = None if self.generator is None else self.generator.get_state()
        state = {} if owned else dict(self.state)
        try:
            yield state
        finally:
            if owned and generator is not None and self.generator is not None:
                self.generator.set_state(generator)
        if self.state and not owned:
            self.state.update(state)
            self.__dict__["_learnt_alone"] = True
