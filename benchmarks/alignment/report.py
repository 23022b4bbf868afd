"""The comparisons as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.alignment.strategies import REFERENCE
from benchmarks.tables import Column, Row, plus_minus, section, table_of

_TIMES = (
    "Milliseconds are medians of a whole step, the closure included, in processor time of one "
    "thread; they are not reproducible."
)
_MANY = (
    "With 95% intervals, of twenty strategies that change nothing one differs on average; a single "
    "interval without 0 is weak evidence."
)


def report(record: Mapping[str, Any]) -> str:
    """The whole report of one problem."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    sections = [
        f"# {record['title']}",
        f"Made by `{record['command']}`.\n\nMachine: {machine}.",
        record["about"],
        *_BODIES[record["problem"]](record),
        _failures(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _toy(record: Mapping[str, Any]) -> list[str]:
    columns: list[Column] = [
        ("starts that reach the front", lambda row: f"{row['reached']} of {row['starts']}"),
        ("mean final L1 + L2", lambda row: f"{row['sum']:.2f}"),
        ("ms a step", _milliseconds),
    ]
    return [_by_strategy(record["rows"], columns), _TIMES]


def _fronts(record: Mapping[str, Any]) -> list[str]:
    columns: list[Column] = [
        ("mean distance to the front", lambda row: f"{row['distance']:.4f}"),
        ("spread of f1", lambda row: f"{row['spread']:.3f}"),
        ("Pareto-stationary", lambda row: f"{row['stationary']} of {row['starts']}"),
        ("ms a step", _milliseconds),
    ]
    sections = []
    for key in dict.fromkeys(row["problem"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["problem"] == key]
        sections += [f"## {record['titles'][key]}", _by_strategy(rows, columns)]
    return [*sections, _TIMES]


def _trainings(record: Mapping[str, Any]) -> list[str]:
    measures: Mapping[str, str] = record["measures"]
    values: list[Column] = [
        (title, lambda row, measure=measure: _interval(row[measure]))  # type: ignore[misc]
        for measure, title in measures.items()
    ]
    values += [
        ("conflicts, %", _conflicts),
        ("ms a step", _milliseconds),
    ]
    differences: list[Column] = [
        (
            title,
            lambda row, measure=measure: _interval(  # type: ignore[misc]
                row.get(f"{measure}, difference"), "+"
            ),
        )
        for measure, title in measures.items()
    ]
    good = [line for line in record["summary"] if not line["error"]]
    compared = [line for line in good if line["strategy"] != REFERENCE]
    if not any(line["strategy"] == REFERENCE for line in good):
        compared = []  # there is nothing to take a difference from
    count = record["summary"][0]["n"]
    return [
        _by_strategy(good, values),
        *section(f"Minus {REFERENCE}", _by_strategy(compared, differences)),
        f"Means over {count} trainings ± half of Student's 95% interval; the differences to "
        f"{REFERENCE} are taken in pairs in which all else is the same. {_MANY}",
        "Conflicts are the share of pairs of objectives, over all steps, whose gradients, as the "
        f"step applied them, had a negative cosine. {_TIMES}",
    ]


_BODIES: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "toy": _toy,
    "fonseca": _fronts,
    "zdt": _fronts,
    "digits": _trainings,
    "fundus": _trainings,
}


def _conflicts(row: Row) -> str:
    return "-" if row["conflict"] is None else f"{100 * row['conflict']:.1f}"


def _milliseconds(row: Row) -> str:
    return f"{row['milliseconds']:.2f}"


def _by_strategy(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    return table_of(rows, columns, "strategy", "strategy")


def _interval(value: Mapping[str, float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return plus_minus(value["mean"], (value["high"] - value["low"]) / 2, sign)


def _failures(record: Mapping[str, Any]) -> str:
    """Which strategies failed, and by what; a problem's rows or its summary say it."""
    rows = record.get("summary", record["rows"])
    failed = {f"- {row['strategy']}: {row['error']}": None for row in rows if row["error"]}
    return "\n".join(["Failed, at least from one start or seed:", "", *failed]) if failed else ""
