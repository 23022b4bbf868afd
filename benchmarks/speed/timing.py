"""Timing in turn, and what is said of the times: medians of paired ratios."""

import gc
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from benchmarks.speed.comparison import FLOOR, Comparison, MakeStep, Step

RATIO = "ratio to the floor"
WARM_UP = 1
WARM_UP_ON_CUDA = 3
"""Libraries choose kernels and the allocator grows in the first ones."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Rounds:
    """How long to measure.

    Attributes:
        at_least: Rounds in which gradkit and the floor take part.
        peers: The first of these rounds, in which the peers take part too; with 0 they are not
            even made, and the process's memory is gradkit's and the floor's own.
        seconds: For how long gradkit and the floor go on with further rounds.
    """

    at_least: int
    peers: int
    seconds: float


class Clock:
    """Times steps: by the wall clock on a CPU, by events on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.warm_up = WARM_UP_ON_CUDA if self._cuda else WARM_UP

    def time(self, step: Step) -> float:
        """Seconds that one step takes."""
        if not self._cuda:
            start = perf_counter()
            step()
            return perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def time_in_turn(comparison: Comparison, clock: Clock, rounds: Rounds) -> dict[str, list[float]]:
    """Seconds of each variant and of the floor, round by round.

    The order is rotated from round to round. Peers take part in the first few, so that their
    lists may be shorter. Where the comparison says so, another step's time is taken off.
    """
    peers = comparison.peers if rounds.peers else {}
    makers: dict[str, MakeStep] = {FLOOR: comparison.floor, **comparison.ours, **peers}
    less = {name: f"{name}, without the method" for name in comparison.without}
    makers |= {less[name]: make for name, make in comparison.without.items()}
    with warnings.catch_warnings():
        # TorchJD's vectorised backward meets operations that can only be batched by a loop.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        steps = {name: make() for name, make in makers.items()}
        for step in steps.values():
            for _ in range(clock.warm_up):
                step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        start, number = perf_counter(), 0
        while number < rounds.at_least or perf_counter() - start < rounds.seconds:
            names = [
                name for name in steps if number < rounds.peers or name not in comparison.peers
            ]
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(clock.time(steps[name]))
            number += 1
    for name, other in less.items():
        subtracted = times.pop(other)
        times[name] = [a - b for a, b in zip(times[name], subtracted, strict=True)]
    del steps
    gc.collect()
    return times


def summarise(
    times: Mapping[str, Sequence[float]], seed: int, reference: str = FLOOR
) -> dict[str, dict[str, float]]:
    """For each variant its median, and medians of its ratio to the reference and excess over it.

    Ratios and excesses are of times in the same round; the intervals are bootstraps of their
    medians.
    """
    summary = {}
    for name, values in times.items():
        pairs = list(zip(values, times[reference], strict=False))  # peers stop earlier
        ratios = [value / floor for value, floor in pairs]
        excesses = [(value - floor) * 1e3 for value, floor in pairs]
        low, high = median_interval(ratios, seed)
        excess_low, excess_high = median_interval(excesses, seed)
        summary[name] = {
            "rounds": len(values),
            "milliseconds": statistics.median(values) * 1e3,
            "value": statistics.median(ratios),
            "low": low,
            "high": high,
            "excess": statistics.median(excesses),
            "excess_low": excess_low,
            "excess_high": excess_high,
        }
    return summary


def median_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the median; the same for the same seed.

    Example:
        >>> median_interval([2.0, 2.0, 2.0], seed=0)
        (2.0, 2.0)
    """
    cases = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(cases), (RESAMPLES, len(cases)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    medians = cases[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(ends).tolist()
    return low, high


def bandwidth(device: torch.device, numbers: int = 1 << 26) -> float:
    """GB/s read and written by a copy of a large float32 tensor; median of nine."""
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    target.copy_(source)
    seconds = statistics.median(clock.time(lambda: target.copy_(source)) for _ in range(9))
    return 2 * 4 * numbers / seconds / 1e9
