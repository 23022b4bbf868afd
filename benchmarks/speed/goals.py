"""What a step may cost, and whether it does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.speed.gsema import METHOD as GS_EMA
from benchmarks.speed.gsema import SIGNS, WITHOUT_ZEROS
from benchmarks.speed.memory import MEMORY
from benchmarks.speed.methods import ENGINES, gradkit_name
from benchmarks.speed.overhead import NETWORK, OVERHEAD
from benchmarks.speed.problem import RESUNET
from benchmarks.speed.rules import TO_FLOOR, TO_PCGRAD, kind_of
from benchmarks.speed.sharpness import METHODS as SHARP
from benchmarks.speed.sharpness import TO_PASSES, limits
from benchmarks.speed.stream import WEIGHTINGS
from benchmarks.speed.timing import RATIO
from benchmarks.speed.weights import OURS, SOLVERS, WEIGHTS
from gradkit.surgery import Rule

Row = Mapping[str, Any]
Outcome = Literal["met", "open", "missed"]


@dataclass(frozen=True)
class Goal:
    """A limit on one measure of a method, in both engines unless variants are named.

    Attributes:
        measure: What is measured.
        network: On which network; None: on any.
        case: At which batch and size; None: at any.
        method: The method's name, as in the rows.
        limit: What it may be.
        variants: Of which variants.
        listed: Whether the table of goals has it where it is met, too. There are hundreds for
            rules.
    """

    measure: str
    network: str | None
    case: str | None
    method: str
    limit: float
    variants: tuple[str, ...] = tuple(map(gradkit_name, ENGINES))
    listed: bool = True

    def fits(self, row: Row) -> bool:
        """Whether a row is to meet this."""
        return self.is_about(row) and row["variant"] in self.variants

    def is_about(self, row: Row) -> bool:
        """Whether a row is about this, whichever the variant."""
        return (
            row["measure"] == self.measure
            and row["method"] == self.method
            and self.network in (None, row["network"])
            and self.case in (None, row["case"])
        )


GOALS = (
    Goal(RATIO, RESUNET, "2x64", "PCGrad, K = 4", 1.25),
    Goal(RATIO, RESUNET, "4x128", "PCGrad, K = 4", 1.10),
    Goal(RATIO, RESUNET, "8x192", "PCGrad, K = 4", 1.03),
    Goal(RATIO, RESUNET, "2x64", "SAM", 1.10),
    Goal(RATIO, RESUNET, "4x128", "SAM", 1.07),
    Goal(RATIO, RESUNET, "8x192", "SAM", 1.03),
    Goal(RATIO, RESUNET, None, GS_EMA, 1.10),
    Goal(RATIO, RESUNET, None, SIGNS, 2.0, variants=(WITHOUT_ZEROS,)),
    Goal(OVERHEAD, NETWORK, None, "engine, K = 1", 0.3),
    Goal(OVERHEAD, NETWORK, None, "engine, K = 4", 0.5),
    Goal(OVERHEAD, NETWORK, None, "engine and PCGrad, K = 4", 0.5),
    *(Goal(MEMORY, None, None, f"PCGrad, K = {count}", count + 1.0) for count in (2, 4, 8, 16)),
    *(Goal(RATIO, RESUNET, None, f"{name}, K = 4", 1.1) for name in WEIGHTINGS),
    *(Goal(TO_PASSES, RESUNET, case, name, limit) for name, case, limit in limits()),
    # Their documentation gives whole numbers.
    *(Goal(MEMORY, None, None, name, method.memory + 0.1) for name, method in SHARP.items()),
)


def rule_goals(rules: Mapping[str, type[Rule]], count: int) -> list[Goal]:
    """Rules by Gram matrix as fast as PCGrad; those by number within half of the floor above it."""
    return [
        Goal(TO_PCGRAD, RESUNET, None, f"{name}, K = {count}", 1.05, listed=False)
        if kind_of(rule) == "Gram"
        else Goal(TO_FLOOR, RESUNET, "4x128", f"{name}, K = {count}", 1.5, listed=False)
        for name, rule in rules.items()
    ]


def weight_goals(rules: Mapping[str, type[Rule]]) -> list[Goal]:
    """Microseconds for 64 objectives: more where a problem of optimisation is solved."""
    limits = {name: 20_000 if name in SOLVERS else 1_000 for name in rules}
    return [
        Goal(WEIGHTS, None, None, f"{name}, K = 64", limit, variants=(OURS,), listed=False)
        for name, limit in limits.items()
    ]


def outcome(row: Row, limit: float) -> Outcome:
    """Whether a measured value is within its limit: "met" if it is.

    A value above the limit is "missed" if its whole interval is above it, too, else "open": the
    measurement cannot tell it from the limit.

    Example:
        >>> outcome({"value": 1.2, "low": 0.95, "high": 1.49}, 1.1)
        'open'
    """
    if row["value"] <= limit:
        return "met"
    return "open" if row["low"] <= limit else "missed"


def judge(rows: Sequence[Row], goals: Iterable[Goal] = GOALS) -> list[dict[str, Any]]:
    """For each goal and engine, what was measured and what came out.

    Goals that nothing was measured for are left out.
    """
    return [
        {
            "measure": goal.measure,
            "network": row["network"],
            "case": row["case"],
            "method": goal.method,
            "variant": row["variant"],
            "limit": goal.limit,
            "value": row["value"],
            "low": row["low"],
            "high": row["high"],
            "outcome": outcome(row, goal.limit),
            "listed": goal.listed,
        }
        for goal in goals
        for row in rows
        if goal.fits(row)
    ]


def verdict(judged: Row) -> str:
    """In words; above the goal with how far the value, and where missed its interval, are from it.

    Examples:
        >>> verdict({"limit": 1.1, "value": 1.25, "low": 1.2, "high": 1.4, "outcome": "missed"})
        'missed by 0.15 [0.10, 0.30]'
        >>> verdict({"limit": 1.1, "value": 1.2, "low": 0.95, "high": 1.49, "outcome": "open"})
        'open: 0.10 above, within the interval'
    """
    if judged["outcome"] == "met":
        return "met"
    value, low, high = (judged[key] - judged["limit"] for key in ("value", "low", "high"))
    above = f"{value:.2f}" if value >= 0.005 else "less than 0.01"
    if judged["outcome"] == "open":
        return f"open: {above} above, within the interval"
    return f"missed by {above} [{low:.2f}, {high:.2f}]"
