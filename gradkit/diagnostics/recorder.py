"""The records of many steps, as columns of numbers."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradkit.core.arguments import check_count
from gradkit.optimizer import GradientOptimizer, StepRecord
from gradkit.optimizer.record import scalars_of

# After so many records the device is waited for.
_PENDING = 256


class Recorder:
    """Follows an optimizer and keeps what each step did: losses, norms, cosines, weights, factors.

    It reads `optimizer.last_step` in a hook after the step. Tensors stay on the device, and are
    copied to the host together, for 256 steps at a time or when columns are asked for. A step that
    was skipped is kept with `applied` 0; one that raised is not.

    Columns are named as in `StepRecord.scalars`, with `step` before them, the number of the step,
    counted from 1. Where an objective had no part in a step, its entries are NaN. Cosines and norms
    are of the gradients that the step applied (with SAM, at the displaced weights) before rules
    weighted them. They take eight bytes each, K losses, norms and weights and K(K - 1)/2 cosines
    for each step; `every` keeps them few in long trainings.

    Args:
        optimizer: The optimizer to follow.
        every: Record one step in so many, beginning with the first.

    Raises:
        TypeError: If the optimizer was not made by `gk.wrap` or a recipe.
        ValueError: If `every` is not a positive whole number.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.PCGrad())
        >>> recorder = gk.diagnostics.Recorder(optimizer)
        >>> for _ in range(3):
        ...     _ = optimizer.step({"a": lambda: w[0], "b": lambda: w[1] - w[0]})
        >>> recorder["step"], recorder.cosine("a", "b").round(4)
        (array([1., 2., 3.]), array([-0.7071, -0.7071, -0.7071]))
        >>> recorder.conflicts()
        {('a', 'b'): 1.0}
    """

    def __init__(self, optimizer: GradientOptimizer, *, every: int = 1) -> None:
        if not isinstance(optimizer, GradientOptimizer):
            raise TypeError(
                f"a {type(optimizer).__name__} keeps no record of its steps; pass the optimizer "
                "that gk.wrap() returned"
            )
        check_count("every", every)
        self.every = every
        self._seen = 0
        self._pending: list[tuple[int, StepRecord]] = []
        self._names: list[str] = []
        self._columns: dict[str, array[float]] = {"step": array("d")}
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, arguments: Any, named: Any) -> None:
        self._seen += 1
        if (self._seen - 1) % self.every == 0 and optimizer.last_step is not None:
            self._pending.append((self._seen, optimizer.last_step))
            if len(self._pending) >= _PENDING:
                self._read()

    def _read(self) -> None:
        """Copy what is still on the device to the columns."""
        pending, self._pending = self._pending, []
        scalars = scalars_of([record for _, record in pending])
        for (number, record), found in zip(pending, scalars, strict=True):
            self._names += [name for name in record.names if name not in self._names]
            row = {"step": float(number), **self._in_order(record.names, found)}
            for name in row:
                if name not in self._columns:
                    self._columns[name] = array("d", [np.nan]) * len(self._columns["step"])
            for name, column in self._columns.items():
                column.append(row.get(name, np.nan))

    def _in_order(self, names: Sequence[str], found: dict[str, float]) -> dict[str, float]:
        """Numbers with pairs of objectives in the order in which those were first seen."""
        order = self._names.index
        for a, b in combinations(names, 2):
            if order(a) > order(b):
                found[f"cosine/{b}/{a}"] = found.pop(f"cosine/{a}/{b}")
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives so far, in the order in which they were first seen."""
        self._read()
        return tuple(self._names)

    def __len__(self) -> int:
        """How many steps are recorded."""
        return len(self._columns["step"]) + len(self._pending)

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """The columns by name, one number [S] for each recorded step."""
        self._read()
        return {name: np.array(column) for name, column in self._columns.items()}

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """A column [S].

        Raises:
            KeyError: If there is no column of that name.
        """
        self._read()
        if name not in self._columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(self._columns)}")
        return np.array(self._columns[name])

    def cosine(self, a: str, b: str) -> NDArray[np.float64]:
        """The cosine of two objectives' gradients in each recorded step [S].

        Raises:
            ValueError: If one of them is the other, or was in no recorded step.
        """
        names = self.names
        for name in (a, b):
            if name not in names:
                raise ValueError(f"no recorded step had an objective {name!r}; there were {names}")
        if a == b:
            raise ValueError(f"a cosine is of two objectives, and both are {a!r}")
        first, second = sorted((a, b), key=names.index)
        column = f"cosine/{first}/{second}"  # which may be missing: they never met in a step
        return self[column] if column in self._columns else np.full(len(self), np.nan)

    def conflicts(self) -> dict[tuple[str, str], float]:
        """For each pair of objectives, the share of steps in which their cosine was negative.

        Of applied steps only, and NaN where a pair's cosine is not known of any.
        """
        found = {}
        applied = self["applied"] == 1 if len(self) else np.zeros(0, dtype=bool)
        for a, b in combinations(self.names, 2):
            cosines = self.cosine(a, b)[applied]
            known = cosines[~np.isnan(cosines)]
            found[a, b] = float((known < 0).mean()) if len(known) else np.nan
        return found

    def to_csv(self, path: str | Path) -> None:
        """Write the columns to a file with a head line; what is not known is left empty."""
        columns = self.columns()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in zip(*columns.values(), strict=True):
                writer.writerow(["" if np.isnan(value) else f"{value:.9g}" for value in row])

    def close(self) -> None:
        """Follow the optimizer no longer; what was recorded stays."""
        self._handle.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What is recorded, as tensors and plain values, for a checkpoint beside the optimizer."""
        columns = {name: torch.from_numpy(column) for name, column in self.columns().items()}
        return {"seen": self._seen, "names": list(self._names), "columns": columns}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another recorder has recorded, and go on counting from there.

        Raises:
            ValueError: If it is not what `state_dict` returned; nothing is changed then.
        """
        missing = {"seen", "names", "columns"} - set(state_dict)
        if missing or "step" not in state_dict["columns"]:
            lacks = ", ".join(map(repr, sorted(missing))) or "the column 'step'"
            raise ValueError(f"the saved record lacks {lacks}; pass what state_dict() returned")
        lengths = {name: len(column) for name, column in state_dict["columns"].items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the saved columns have different lengths: {lengths}")
        self._pending = []
        self._seen, self._names = state_dict["seen"], list(state_dict["names"])
        self._columns = {
            name: array("d", column.tolist()) for name, column in state_dict["columns"].items()
        }
