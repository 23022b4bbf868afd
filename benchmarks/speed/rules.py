"""The step of every rule of surgery, beside the same floor and beside PCGrad's step."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from benchmarks.speed.comparison import FLOOR, Comparison, Traffic
from benchmarks.speed.methods import gradkit_name, surgery
from benchmarks.speed.passes import backward_passes
from benchmarks.speed.problem import Problem
from benchmarks.speed.timing import Clock, Rounds, summarise, time_in_turn
from benchmarks.tables import Row, interval, table
from gradkit import surgery as package
from gradkit.surgery import ElementwiseRule, GramRule, PCGrad, Rule

TO_FLOOR = "a rule's step / its floor"
TO_PCGRAD = "a rule's step / PCGrad's"
VARIANT = gradkit_name("functional")
KINDS: Mapping[str, type[Rule]] = {"Gram": GramRule, "elementwise": ElementwiseRule}
ABOUT = (
    "1 forward and K backward passes and the base's step, in turn with PCGrad's step and those of "
    "a few rules at a time, each with its default arguments, in the functional engine. PCGrad is "
    "among the rules too: its ratio to itself shows what the intervals are worth."
)
_REFERENCE = "PCGrad, for reference"
# Each has a network and a step's memory of its own.
_AT_A_TIME = 4


def exported_rules() -> dict[str, type[Rule]]:
    """The rules that gradkit exports and that can be made without arguments, by name."""
    found: dict[str, type[Rule]] = {}
    for name in sorted(package.__all__):
        rule = getattr(package, name)
        if (
            inspect.isclass(rule)
            and issubclass(rule, tuple(KINDS.values()))
            and not inspect.isabstract(rule)
            and _needs_no_argument(rule)
        ):
            found[name] = rule
    return found


def _needs_no_argument(made: type[Rule]) -> bool:
    parameters = inspect.signature(made).parameters.values()
    return all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in parameters
    )


def kind_of(rule: type[Rule]) -> str:
    """What a rule works on."""
    return next(kind for kind, base in KINDS.items() if issubclass(rule, base))


def takes(rule: type[Rule], count: int) -> bool:
    """Whether a rule can be applied to so many gradients."""
    made = rule()
    try:
        if isinstance(made, GramRule):
            made.weights(torch.eye(count, dtype=torch.float64), torch.ones(count).double())
        else:
            made(torch.eye(count))
    except ValueError:
        return False
    return True


def measure_rules(
    problem: Problem,
    rules: Mapping[str, type[Rule]],
    count: int,
    clock: Clock,
    rounds: int,
    seed: int,
) -> list[dict[str, Any]]:
    """For each rule its ratio to the floor, and that to PCGrad in the same rounds."""
    rows = []
    for group in _groups([name for name, rule in rules.items() if takes(rule, count)]):
        print(f"{problem.network}, {problem.case}, {', '.join(group)}, K = {count}", flush=True)
        comparison = compare(problem, {name: rules[name] for name in group}, count)
        times = time_in_turn(comparison, clock, Rounds(rounds, 0, 0))
        for measure, reference in ((TO_FLOOR, FLOOR), (TO_PCGRAD, _REFERENCE)):
            summary = summarise(times, seed, reference)
            rows += [
                {
                    "measure": measure,
                    "network": problem.network,
                    "case": problem.case,
                    "method": f"{name}, K = {count}",
                    "variant": VARIANT,
                    "kind": kind_of(rules[name]),
                    **summary[name],
                }
                for name in group
            ]
    return rows


def compare(problem: Problem, rules: Mapping[str, type[Rule]], count: int) -> Comparison:
    """The floor, PCGrad and these rules."""
    made = {_REFERENCE: PCGrad, **rules}
    return Comparison(
        method=f"rules, K = {count}",
        passes=f"1 forward, {count} backward, base step (2R 1W)",
        floor=functools.partial(backward_passes, problem, count),
        ours={
            name: functools.partial(surgery, problem, count, rule, "functional")
            for name, rule in made.items()
        },
        peers={},
        traffic=Traffic((), problem.parameters()),
    )


def _groups(names: Sequence[str]) -> Iterator[list[str]]:
    remaining = iter(names)
    while group := list(islice(remaining, _AT_A_TIME)):
        yield group


def rules_table(rows: Sequence[Row]) -> str:
    """Both ratios, a line for each rule, network, case and number of objectives."""
    by_place = {
        (row["measure"], row["network"], row["case"], row["method"]): row
        for row in rows
        if row["measure"] in (TO_FLOOR, TO_PCGRAD)
    }
    head = ("network", "case", "rule", "kind", "ms", "ratio to the floor", "ratio to PCGrad")
    return table(
        head,
        3,
        (
            (
                network,
                case,
                method,
                row["kind"],
                f"{row['milliseconds']:.1f}",
                interval(row),
                interval(by_place[TO_PCGRAD, network, case, method]),
            )
            for (measure, network, case, method), row in by_place.items()
            if measure == TO_FLOOR
        ),
    )
