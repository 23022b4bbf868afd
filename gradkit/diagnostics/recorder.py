"""The records of many steps, as columns of numbers."""

from __future__ import annotations

import csv
import threading
from array import array
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradkit.core.arguments import check_count
from gradkit.core.interrupts import Interrupts
from gradkit.optimizer import GradientOptimizer, StepRecord
from gradkit.optimizer.record import Key, numbers_of, scalar_name

_STEP: Key = ("step",)

# After so many records, or inner products in them, the device is waited for.
_PENDING = 256
_PENDING_PRODUCTS = 2**20

# An error names so many columns.
_SHOWN = 40

# Another thread may read what a training records. One lock for all recorders, which is held for
# moments, so that a recorder can be copied and pickled.
_LOCK = threading.RLock()


class Recorder:
    """Follows an optimizer and keeps what each step did: losses, norms, cosines, weights, factors.

    It reads `optimizer.last_step` in a hook after the step. Tensors stay on the device, and are
    copied to the host together, for 256 steps at a time or when columns are asked for. A step that
    was skipped is kept with `applied` 0; one that raised is not.

    Columns are named as in `StepRecord.scalars`, with `step` before them, the number of the step,
    counted from 1. Where an objective had no part in a step, its entries are NaN. Cosines and norms
    are of the gradients that the step applied (with SAM, at the displaced weights) before rules
    weighted them. They take eight bytes each, K losses, norms and weights and K(K - 1)/2 cosines
    for each step; `every` keeps them few in long trainings. Another thread may read columns while
    steps are recorded.

    Args:
        optimizer: The optimizer to follow.
        every: Record one step in so many, beginning with the first.

    Raises:
        TypeError: If the optimizer was not made by `gk.wrap` or a recipe, or if `every` is no
            whole number.
        ValueError: If `every` is less than 1.

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
            if optimizer is None:
                raise TypeError("there is no optimizer: an adapter that trains nothing has none")
            holds = isinstance(getattr(optimizer, "optimizer", None), GradientOptimizer)
            raise TypeError(
                f"a {type(optimizer).__name__} keeps no record of its steps; pass "
                + ("its attribute optimizer" if holds else "the optimizer that gk.wrap() returned")
            )
        check_count("every", every)
        self.every = every
        self._seen = 0
        self._pending: list[tuple[int, StepRecord]] = []
        self._products = 0
        self._names: list[str] = []
        self._columns: dict[Key, array[float]] = {_STEP: array("d")}
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, arguments: Any, named: Any) -> None:
        with _LOCK:
            self._seen += 1
            record = optimizer.last_step
            if (self._seen - 1) % self.every != 0 or record is None:
                return
            self._pending.append((self._seen, record))
            self._products += len(record.names) ** 2
            if len(self._pending) >= _PENDING or self._products >= _PENDING_PRODUCTS:
                self._read()

    def _read(self) -> None:
        """Copy what is still on the device to the columns. Needs the lock."""
        if not self._pending:
            return
        names, place = list(self._names), {name: n for n, name in enumerate(self._names)}
        for _, record in self._pending:
            for name in record.names:
                if place.setdefault(name, len(names)) == len(names):
                    names.append(name)
        rows: list[dict[Key, float]] = []
        numbers = numbers_of([record for _, record in self._pending])
        for (step, _), found in zip(self._pending, numbers, strict=True):
            rows.append({_STEP: float(step)})
            for (kind, *of), value in found.items():
                rows[-1][(kind, *sorted(of, key=place.__getitem__))] = value
        interrupts = Interrupts()
        interrupts.begin()  # a row is in all columns or in none
        try:
            self._names, self._pending, self._products = names, [], 0
            for row in rows:
                for key in row:
                    if key not in self._columns:
                        self._columns[key] = array("d", [np.nan]) * len(self._columns[_STEP])
                for key, column in self._columns.items():
                    column.append(row.get(key, np.nan))
        finally:
            interrupts.end()

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives so far, in the order in which they were first seen."""
        with _LOCK:
            self._read()
            return tuple(self._names)

    def __len__(self) -> int:
        """How many steps are recorded."""
        with _LOCK:
            return len(self._columns[_STEP]) + len(self._pending)

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """The columns by name, one number [S] for each recorded step."""
        with _LOCK:
            self._read()
            return {scalar_name(key): np.array(column) for key, column in self._columns.items()}

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """A column [S].

        Raises:
            KeyError: If there is no column of that name.
        """
        with _LOCK:
            self._read()
            keys = {scalar_name(key): key for key in self._columns}
            if name not in keys:
                rest = f" and {len(keys) - _SHOWN} more" * (len(keys) > _SHOWN)
                raise KeyError(f"no column {name!r}; there are {', '.join([*keys][:_SHOWN])}{rest}")
            return np.array(self._columns[keys[name]])

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
        with _LOCK:
            column = self._columns.get(("cosine", *sorted((a, b), key=names.index)))
            # It is missing if they never met in a step.
            return np.full(len(self), np.nan) if column is None else np.array(column)

    def conflicts(self) -> dict[tuple[str, str], float]:
        """For each pair of objectives, the share of steps in which their cosine was negative.

        Of applied steps only, and NaN where a pair's cosine is not known of any.
        """
        found = dict.fromkeys(combinations(self.names, 2), np.nan)
        with _LOCK:
            applied = np.array(self._columns.get(("applied",), [])) == 1
            for (kind, *pair), column in self._columns.items():
                cosines = np.array(column)
                known = cosines[~np.isnan(cosines) & applied] if kind == "cosine" else cosines[:0]
                if len(known):
                    found[pair[0], pair[1]] = float((known < 0).mean())
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
        with _LOCK:
            self._read()
            return {
                "seen": self._seen,
                "names": list(self._names),
                "keys": [list(key) for key in self._columns],
                "columns": [torch.from_numpy(np.array(each)) for each in self._columns.values()],
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another recorder has recorded, and go on counting from there.

        Raises:
            ValueError: If it is not what `state_dict` returned; nothing is changed then.
        """
        missing = {"seen", "names", "keys", "columns"} - set(state_dict)
        if missing:
            raise ValueError(
                f"the saved record lacks {', '.join(map(repr, sorted(missing)))}; pass what "
                "state_dict() returned"
            )
        keys = [tuple(key) for key in state_dict["keys"]]
        lengths = [len(column) for column in state_dict["columns"]]
        if _STEP not in keys or len(keys) != len(lengths) or len(set(lengths)) > 1:
            raise ValueError(
                f"the saved record has the columns {keys}, of {lengths} steps; pass what "
                "state_dict() returned"
            )
        columns = [array("d", column.tolist()) for column in state_dict["columns"]]
        with _LOCK:
            self._pending, self._products = [], 0
            self._seen, self._names = state_dict["seen"], list(state_dict["names"])
            self._columns = dict(zip(keys, columns, strict=True))
