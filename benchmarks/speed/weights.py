"""What a rule by itself costs: weights for a Gram matrix, beside TorchJD's of the same name."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.comparison import Step
from benchmarks.speed.peers import TORCHJD
from benchmarks.speed.rules import takes
from benchmarks.speed.timing import Clock, median_interval
from benchmarks.tables import Row, table
from gradkit.surgery import GramRule, Rule

WEIGHTS = "µs for a rule's weights"
OURS = "gradkit"
OBJECTIVES = (2, 4, 8, 16, 64)
SOLVERS = frozenset(
    ("CAGrad", "DualProj", "FairGrad", "MGDA", "NashMTL", "PCD", "SDMGrad", "UPGrad")
)
"""Rules that solve an optimisation problem, and may cost more."""
RANDOM, CONFLICTING, BATCH = "random", "conflicting", "150 random ones at once"
ABOUT = (
    "Microseconds of `rule.weights(gram)`, medians of many calls, on Gram matrices of K random "
    "vectors of 1000 numbers; on one of K vectors of lengths 0.1 to 10, each in conflict with all "
    'others; and on a batch of 150 of the first kind, as `scope="tensor"` makes. '
    f"{TORCHJD}'s weighting of the same name, where it takes this Gram matrix, in the same "
    "process; it has no batches, and its own tolerances and iterations. The two take turns of many "
    "calls, with a rest before each: threads of one library wait for work for a while, and would "
    "keep a core from the other."
)
_TURNS = 2
_LEAST_CALLS = 5
_REST = 0.25
"""Seconds before a turn; OpenMP's threads wait actively for 0.2."""
_VECTOR = 1000
_BATCH = 150
# What TorchJD has no default for.
_ARGUMENTS: Mapping[str, Mapping[str, float]] = {
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 1},
}


def random_gram(count: int, *batch: int) -> Tensor:
    """The Gram matrix of `count` standard normal vectors."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*batch, count, _VECTOR, dtype=torch.float64, generator=generator)
    return rows @ rows.mT


def conflicting_gram(count: int) -> Tensor:
    """That of orthonormal vectors less 0.99 of their mean, then of lengths from 0.1 to 10.

    Example:
        >>> conflicting_gram(2)
        tensor([[ 5.0005e-03, -4.9995e-01],
                [-4.9995e-01,  5.0005e+01]], dtype=torch.float64)
    """
    apart = torch.eye(count, dtype=torch.float64) - 0.99 / count
    lengths = torch.logspace(-1, 1, count, dtype=torch.float64)
    return lengths[:, None] * (apart @ apart.T) * lengths


def grams() -> Iterator[tuple[str, int, Tensor]]:
    """Each kind of Gram matrix, with K."""
    for count in OBJECTIVES:
        yield RANDOM, count, random_gram(count)
        yield CONFLICTING, count, conflicting_gram(count)
    yield BATCH, 4, random_gram(4, _BATCH)


def torchjd_weighting(name: str) -> nn.Module | None:
    """TorchJD's weighting for Gram matrices of this name, if there is one."""
    import torchjd.aggregation

    kind = getattr(torchjd.aggregation, f"{name}Weighting", None)
    if kind is None or "_GramianWeighting" not in {base.__name__ for base in kind.__mro__}:
        return None
    weighting: nn.Module = kind(**_ARGUMENTS.get(name, {}))
    return weighting


def measure_weights(
    rules: Mapping[str, type[Rule]], clock: Clock, device: torch.device, seconds: float, seed: int
) -> list[dict[str, Any]]:
    """One row for each rule, kind of Gram matrix, K, and library."""
    rows: list[dict[str, Any]] = []
    for name, rule in rules.items():
        if not issubclass(rule, GramRule):
            continue
        print(f"weights of {name}", flush=True)
        for case, count, gram in grams():
            if not takes(rule, count):
                continue
            gram = gram.to(device)
            calls: dict[str, Step] = {OURS: _call(rule().weights, gram, rule.needs_losses)}
            theirs = torchjd_weighting(name) if gram.dim() == 2 else None
            if theirs is not None and _works(call := _call(theirs, gram)):
                calls[TORCHJD] = call
            for variant, times in _in_turn(calls, clock, seconds).items():
                low, high = median_interval([time * 1e6 for time in times], seed)
                rows.append(
                    {
                        "measure": WEIGHTS,
                        "network": "Gram matrix",
                        "case": case,
                        "method": f"{name}, K = {count}",
                        "variant": variant,
                        "rounds": len(times),
                        "value": statistics.median(times) * 1e6,
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def _call(weigh: Callable[..., Tensor], gram: Tensor, with_losses: bool = False) -> Step:
    if not with_losses:
        return lambda: weigh(gram)
    losses = torch.linspace(0.5, 1.5, gram.shape[-1]).to(gram)
    return lambda: weigh(gram, losses)


def _works(call: Step) -> bool:
    try:
        call()
    except Exception:  # too few gradients, or whatever one of several solvers raises
        return False
    return True


def _in_turn(calls: Mapping[str, Step], clock: Clock, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, of each library for half of the time."""
    times: dict[str, list[float]] = {variant: [] for variant in calls}
    for _ in range(_TURNS):
        for variant, call in calls.items():
            if len(calls) > 1:
                sleep(min(_REST, seconds))
            call()
            turn: list[float] = []
            start = perf_counter()
            while len(turn) < _LEAST_CALLS or perf_counter() - start < seconds / _TURNS / 2:
                turn.append(clock.time(call))
            times[variant] += turn
    return times


def weights_tables(rows: Sequence[Row]) -> str:
    """A line for each rule and kind of Gram matrix, a column for each K."""
    ours = {
        (*row["method"].split(", K = "), row["case"]): row
        for row in rows
        if row["measure"] == WEIGHTS and row["variant"] == OURS
    }
    theirs = {
        (*row["method"].split(", K = "), row["case"]): row
        for row in rows
        if row["measure"] == WEIGHTS and row["variant"] == TORCHJD
    }
    lines = []
    for name, case in dict.fromkeys((name, case) for name, _, case in ours if case != BATCH):
        cells = []
        for count in map(str, OBJECTIVES):
            own, other = ours.get((name, count, case)), theirs.get((name, count, case))
            cell = "" if own is None else _short(own["value"])
            if own is not None and other is not None:
                cell += f" ({other['value'] / own['value']:.1f})"
            cells.append(cell)
        batch = ours.get((name, "4", BATCH)) if case == RANDOM else None
        lines.append((name, case, *cells, "" if batch is None else _short(batch["value"])))
    head = ("rule", "Gram", *(f"K = {count}" for count in OBJECTIVES), f"{_BATCH} of K = 4")
    text = table(head, len(OBJECTIVES) + 1, lines)
    return text and f"{text}\n\nIn brackets how many times longer {TORCHJD} takes."


def _short(microseconds: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(microseconds))) if microseconds > 0 else 0
    return f"{microseconds:.{digits}f}"
