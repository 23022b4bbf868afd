"""Test-time adaptation at once beside one by one: GraTa's six views, and episodes of images."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.speed.comparison import FLOOR, Comparison, MakeStep, Step, Traffic
from benchmarks.speed.goals import outcome
from benchmarks.speed.problem import Problem
from benchmarks.speed.timing import Clock, Rounds, summarise, time_in_turn
from benchmarks.tables import Row, interval, table
from gradkit import tta

TO_ONE_BY_ONE = "ratio to one by one"
ONE_BY_ONE, AT_ONCE, WITH_VIEWS = "one by one", "at once", "at once, and the views of each"
VIEWS = "GraTa's step"
GOALS_ON_CUDA = {VIEWS: 1.5, "episodes of TENT": 8.0, "episodes of GraTa": 8.0}
"""How many times faster a CUDA device is to be."""
ABOUT = (
    "One image's step of GraTa with its six views in one vectorised pass (`batched_views=True`), "
    'and the episodes of a whole batch at once (`episodic="image"`), beside one pass for each view '
    "and one episode after the other (`episodic=True`). Statistics are the test's; scales and "
    "shifts are trained."
)


def comparisons(problem: Problem) -> list[Comparison]:
    """GraTa's step on the first image, then episodes of all images."""

    def adapting(images: Tensor, at_a_time: int, method: str, **options: Any) -> Step:
        adapter = getattr(tta, method)(problem.model(), **options)
        return lambda: [adapter(each) for each in images.split(at_a_time)]

    def grata(**options: Any) -> MakeStep:
        return partial(adapting, problem.x[:1], 1, "GraTa", **options)

    def alone(method: str) -> MakeStep:
        return partial(adapting, problem.x, 1, method, episodic=True)

    def together(method: str, **options: Any) -> MakeStep:
        return partial(adapting, problem.x, len(problem.x), method, episodic="image", **options)

    return [
        _comparison(VIEWS, grata(), {AT_ONCE: grata(batched_views=True)}),
        _comparison("episodes of TENT", alone("TENT"), {AT_ONCE: together("TENT")}),
        _comparison(
            "episodes of GraTa",
            alone("GraTa"),
            {AT_ONCE: together("GraTa"), WITH_VIEWS: together("GraTa", batched_views=True)},
        ),
    ]


def _comparison(method: str, alone: MakeStep, together: Mapping[str, MakeStep]) -> Comparison:
    return Comparison(
        method=method, passes="", floor=alone, ours=together, peers={}, traffic=Traffic((), 0)
    )


def measure_tta(problem: Problem, clock: Clock, rounds: Rounds, seed: int) -> list[dict[str, Any]]:
    """A row for each variant, with the ratio of its time to that of one by one."""
    rows = []
    for comparison in comparisons(problem):
        print(f"{problem.network}, {problem.case}, {comparison.method}", flush=True)
        summary = summarise(time_in_turn(comparison, clock, rounds), seed)
        rows += [
            {
                "measure": TO_ONE_BY_ONE,
                "network": problem.network,
                "case": problem.case,
                "method": comparison.method,
                "variant": ONE_BY_ONE if variant == FLOOR else variant,
                **numbers,
            }
            for variant, numbers in summary.items()
        ]
    return rows


def tta_table(rows: Sequence[Row], goals: Mapping[str, float] | None = None) -> str:
    """A line for each variant; with goals, how many times faster each method is to be."""
    head = ("network", "images", "method", "variant", "ms", "ratio to one by one", "times faster")

    def line(row: Row) -> tuple[str, ...]:
        reference = row["variant"] == ONE_BY_ONE
        cells = (
            row["network"],
            row["case"],
            row["method"],
            row["variant"],
            f"{row['milliseconds']:.1f}",
            "1" if reference else interval(row),
            "" if reference else f"{1 / row['value']:.2f}",
        )
        if goals is None:
            return cells
        goal = goals[row["method"]]
        return (*cells, "" if reference else f"≥ {goal:g}: {outcome(row, 1 / goal)}")

    own = [row for row in rows if row["measure"] == TO_ONE_BY_ONE]
    more = () if goals is None else ("goal",)
    return table((*head, *more), 3 + len(more), map(line, own))
