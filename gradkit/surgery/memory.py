"""What rules remember of each objective, kept by name in their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Remembered = Mapping[str, Tensor]
"""What a rule remembers of the objectives that take part: tensors [*batch], [*batch, K] or
[*batch, K, K] by name."""

Weighed = tuple[Float[Tensor, "*batch K"], Remembered]
"""Weights, and what is to be remembered instead."""


def check_remembered(
    who: object, remembered: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> None:
    """Check that a rule remembers nothing that it would not be given again.

    Raises:
        ValueError: If it does.
    """
    unknown = remembered.keys() - known.keys()
    if unknown:
        raise ValueError(
            f"{who!r} remembers {min(unknown)!r}, which its init() does not name; return there "
            "what it is at first"
        )


class Memory:
    """What a transform remembers of each objective, kept by name in its state.

    Tensors end in one dimension of length K, or two, or none, after those of the batch of Gram
    matrices. An objective that takes no part in a step keeps what is remembered of it; one that is
    new begins as `init` says. So does a block of parameters that is new, and a batch of
    another shape.
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
        """Recall.

        Args:
            who: The transform, for messages.
            state: Where it is kept.
            names: The objectives that take part.
            fresh: What is remembered at first of all objectives that `known` names, one batch.
            batch: The shape of the batch.
            blocks: What identifies the batch's Gram matrices; None if nothing does.
            scope: What inner products are taken over; None if that cannot be said.

        Raises:
            ValueError: If the state is that of another scope.
        """
        self._who = who
        self.known = known_objectives(state, names)
        self._places = [self.known.index(name) for name in names]
        self._count = None if blocks is None else len(blocks)
        self._axes = {key: value.dim() for key, value in fresh.items()}
        stored = state.get("blocks")
        self._scope = scope
        learnt, now = state.get("scope") or _scope(stored), scope or _scope(blocks)
        if learnt is None or now is None:  # global or shared, which have one matrix
            differs = (learnt or now) in ("group", "tensor")
        else:
            differs = learnt != now
        if state.get("objectives") and differs:
            raise ValueError(
                f"what {who!r} remembers was learnt with scope={learnt or 'global'!r}, and its "
                f"scope is {now or 'global'!r} now; give it the scope it was saved with, or let it "
                "begin anew with reset()"
            )
        # Blocks of parameters that are frozen now come last.
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
        """What is remembered of the objectives that take part."""
        return {
            key: self._blocks_of_present(whole)[self._where(key)].clone()
            for key, whole in self._whole.items()
        }

    def with_present(
        self, remembered: Mapping[str, Tensor], learns: Sequence[bool] | None = None
    ) -> dict[str, Any]:
        """The state in which what is remembered of those that take part has changed.

        Args:
            remembered: What is to be remembered of them.
            learns: Of which of them; None for all. What belongs to a pair changes with either.

        Raises:
            ValueError: If something is remembered that `init` does not know.
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
                if learns is not None:
                    new = torch.where(
                        self._mask(key, learns, whole), new, present[self._where(key)]
                    )
                present[self._where(key)] = new
            state[key] = whole
        return state

    def _blocks_of_present(self, whole: Tensor) -> Tensor:
        return whole if self._count is None else whole[: self._count]

    def _mask(self, key: str, learns: Sequence[bool], like: Tensor) -> Tensor:
        """Which numbers belong to these; one that belongs to no objective is as it was."""
        mask = torch.tensor([*learns], device=like.device)
        if self._axes[key] == 2:
            return mask[:, None] | mask
        return mask if self._axes[key] == 1 else torch.zeros_like(mask[0])

    def _where(self, key: str) -> tuple[Any, ...]:
        if self._places == list(range(len(self.known))):  # all, in order: nothing to look up
            return (...,)
        places = torch.tensor(self._places, device="cpu")
        if self._axes[key] == 2:
            return (..., places[:, None], places)
        return (..., places) if self._axes[key] == 1 else (...,)


def _scope(blocks: Sequence[str] | None) -> str | None:
    return blocks[0].partition(" ")[0] if blocks else None


def known_objectives(state: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The objectives that something is remembered of, and then those that are new."""
    known: list[str] = list(state.get("objectives") or [])
    return known + [name for name in names if name not in known]
