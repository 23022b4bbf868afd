"""The memory of rules: state for each objective, kept by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkit.surgery.inputs import Remembered


def check_remembered(who: object, remembered: Remembered, known: Mapping[str, Tensor]) -> None:
    """Check that a rule's new memory has known names only.

    Raises:
        ValueError: If it has a name that the rule's `init` does not return.
    """
    unknown = remembered.keys() - known.keys()
    if unknown:
        raise ValueError(
            f"{who!r} remembers {min(unknown)!r}, which its init() does not name; return its "
            "initial value there"
        )


class Memory:
    """A transform's memory of each objective, kept by name in its state.

    The shape of a tensor is that of the batch of Gram matrices, followed by no, one or two
    dimensions of length K. An objective that takes no part in a step keeps its memory. A new
    objective starts with the values of `init`, and so does a new block of parameters, or a batch of
    another shape.

    Args:
        who: The transform, for messages.
        state: The state that holds the memory.
        names: The objectives that take part.
        fresh: The initial memory of all objectives in `known`, without batch dimensions.
        batch: The shape of the batch.
        blocks: The keys of the batch's Gram matrices; None if they have none.
        scope: The parameters over which inner products are computed; None if that is not known.

    Attributes:
        known: All objectives in the memory, then the new ones.

    Raises:
        ValueError: If the state was saved with another scope.
    """

    def __init__(
        self,
        who: object,
        state: Mapping[str, Any],
        names: Sequence[str],
        fresh: Mapping[str, Tensor],
        batch: Sequence[int],
        blocks: Sequence[str] | None,
        scope: str | None = None,
    ) -> None:
        self._who = who
        self.known = known_objectives(state, names)
        self._places = [self.known.index(name) for name in names]
        self._count = None if blocks is None else len(blocks)
        self._axes = {key: value.dim() for key, value in fresh.items()}
        stored = state.get("blocks")
        self._scope = scope
        learnt, now = state.get("scope") or _scope(stored), scope or _scope(blocks)
        if learnt is None or now is None:  # "global" or "shared", which have one matrix
            differs = (learnt or now) in ("group", "tensor")
        else:
            differs = learnt != now
        if state.get("objectives") and differs:
            raise ValueError(
                f"what {who!r} remembers was learnt with scope={learnt or 'global'!r}, and its "
                f"scope is {now or 'global'!r} now; give it the scope it was saved with, or clear "
                "its memory with reset()"
            )
        # Blocks of parameters that are frozen at present come last.
        absent = [block for block in stored or () if block not in (blocks or ())]
        self._blocks = None if blocks is None else [*blocks, *absent]
        shape = tuple(batch) if self._blocks is None else (len(self._blocks),)
        self._whole: dict[str, Tensor] = {}
        for key, value in fresh.items():
            whole = value.expand((*shape, *value.shape)).clone()
            old = state.get(key)
            if old is not None:
                part = whole
                for axis in range(-value.dim(), 0):
                    part = part.narrow(axis, 0, old.shape[axis])
                if self._blocks is not None:
                    part[[self._blocks.index(block) for block in stored or ()]] = old.to(part)
                elif old.shape[: old.dim() - value.dim()] == torch.Size(shape):
                    part.copy_(old)
            self._whole[key] = whole

    def of_present(self) -> dict[str, Tensor]:
        """The memory of the objectives that take part."""
        return {
            key: self._blocks_of_present(whole)[self._where(key)].clone()
            for key, whole in self._whole.items()
        }

    def with_present(
        self, remembered: Remembered, learns: Sequence[bool] | None = None
    ) -> dict[str, Any]:
        """The state after the memory of the objectives that take part has changed.

        Args:
            remembered: The new memory of these objectives.
            learns: Which of these objectives change; None for all. Memory of a pair changes if one
                of the two does.

        Raises:
            ValueError: If the new memory has a name that `init` does not return.
        """
        check_remembered(self._who, remembered, self._whole)
        state: dict[str, Any] = {"objectives": list(self.known)}
        if self._blocks is not None:
            state["blocks"] = self._blocks
        if self._scope is not None:
            state["scope"] = self._scope
        for key, whole in self._whole.items():
            if key in remembered:
                whole = whole.clone()
                present = self._blocks_of_present(whole)
                new = remembered[key].detach().to(whole)
                if learns is not None and not all(learns):
                    new = torch.where(
                        self._mask(key, learns, whole), new, present[self._where(key)]
                    )
                present[self._where(key)] = new
            state[key] = whole
        return state

    def _blocks_of_present(self, whole: Tensor) -> Tensor:
        return whole if self._count is None else whole[: self._count]

    def _mask(self, key: str, learns: Sequence[bool], like: Tensor) -> Tensor:
        """Which elements change; one that belongs to no objective does not."""
        mask = torch.tensor([*learns], device=like.device)
        if self._axes[key] == 2:
            return mask[:, None] | mask
        return mask if self._axes[key] == 1 else torch.zeros_like(mask[0])

    def _where(self, key: str) -> tuple[Any, ...]:
        if self._places == list(range(len(self.known))):  # all, in order: no index is needed
            return (...,)
        places = torch.tensor(self._places, device="cpu")
        if self._axes[key] == 2:
            return (..., places[:, None], places)
        return (..., places) if self._axes[key] == 1 else (...,)


def _scope(blocks: Sequence[str] | None) -> str | None:
    return blocks[0].partition(" ")[0] if blocks else None


def known_objectives(state: Mapping[str, Any], names: Sequence[str] = ()) -> list[str]:
    """The objectives in the memory, followed by new ones."""
    known: list[str] = list(state.get("objectives") or [])
    return known + [name for name in names if name not in known]
