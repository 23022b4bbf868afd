"""Results of an experiment as JSON for programs and as Markdown tables for people.

A result has labels, which tell it from other results (method, centre, seed), and scores by name.
Tables have a column for each label and each score that the caller names.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from examples.common.bootstrap import bootstrap_interval
from examples.common.metrics import mean
from examples.common.scores import CaseScores, mean_scores

MEAN = "mean"
"""The name of a further score: the mean over the others, which must have one unit."""

Label: TypeAlias = str | float | int | None
Interval: TypeAlias = tuple[float, float] | None


@dataclass(frozen=True)
class Result:
    """What one method came to on one set of cases.

    Attributes:
        labels: what tells it from other results, by name; None where a label does not apply.
        cases: the scores of each case; empty where a case has no labels.
    """

    labels: Mapping[str, Label]
    cases: Sequence[CaseScores]

    @property
    def scored(self) -> list[CaseScores]:
        """The cases that have labels, over which means are taken."""
        return [case for case in self.cases if case.scores]

    def score(self, name: str) -> float:
        """The mean over scored cases of a score, or for `MEAN` the mean of these means.

        Raises:
            ValueError: no case is scored.

        Example:
            >>> cases = [CaseScores("a", {"x": 1.0, "y": 2.0}), CaseScores("b", {"x": 3.0, "y": 4})]
            >>> result = Result({"method": "none"}, cases)
            >>> result.score("x"), result.score("mean")
            (2.0, 2.5)
        """
        means = mean_scores(self.scored)
        return _with_mean(means)[name]

    def values(self, name: str) -> list[float]:
        """A score, or for `MEAN` the mean of the scores, of each scored case."""
        return [case.mean if name == MEAN else case.scores[name] for case in self.scored]

    def as_json(self, scores: Sequence[str], unit: str = "case") -> dict[str, Any]:
        """Plain values: labels, number of scored cases, means of scores, and scores of every case.

        Means are None where no case is scored.

        Args:
            scores: names of the scores whose means to write.
            unit: what a case is called, in the singular.
        """
        return {
            **self.labels,
            "n": len(self.scored),
            **{name: self.score(name) if self.scored else None for name in scores},
            f"{unit}s": [{unit: case.case, **case.scores} for case in self.cases],
        }


def write_json(
    results: Iterable[Result], path: Path, scores: Sequence[str], unit: str = "case"
) -> None:
    """Writes a JSON list of results; see `Result.as_json`."""
    content = [result.as_json(scores, unit) for result in results]
    path.write_text(json.dumps(content, indent=1) + "\n")


def remove_results(directory: Path, names: Iterable[str]) -> bool:
    """Removes the results of an earlier run, beside which those of another would be misread.

    Args:
        directory: where the results are, straight in it.
        names: file names of all that a run writes there.

    Returns:
        Whether there were any.
    """
    found = [directory / name for name in names if (directory / name).exists()]
    for path in found:
        path.unlink()
    return bool(found)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        labels: by name.
        n: number of scored cases; None for an average over results.
        scores: mean scores by name; empty where no case is scored.
        intervals: of some scores, by name; None where there are too few cases for one.
    """

    labels: Mapping[str, Label]
    n: int | None
    scores: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)


def scored_row(labels: Mapping[str, Label], n: int, scores: Mapping[str, float]) -> Row:
    """A row of mean scores without intervals, to which `MEAN` is added."""
    return Row(labels, n, _with_mean(scores))


def result_row(result: Result, seed: int, intervals: Collection[str] = (MEAN,)) -> Row:
    """The row of a result.

    Args:
        result: any; without a scored case its row has no scores.
        seed: of the bootstrap.
        intervals: names of the scores that get a 95% bootstrap interval over cases.
    """
    n = len(result.scored)
    if n == 0:
        return Row(result.labels, n, {})
    row = scored_row(result.labels, n, mean_scores(result.scored))
    several = n > 1
    return replace(
        row,
        intervals={
            name: bootstrap_interval(result.values(name), seed) if several else None
            for name in intervals
        },
    )


def average_rows(results: Sequence[Result], over: str, by: str) -> list[Row]:
    """The average over one label for each value of another, unless there is nothing to average.

    Each result counts the same, whatever its number of cases.

    Args:
        results: whose other labels are the same within a group.
        over: name of the label to average over.
        by: name of the label that makes the groups.
    """
    if len({result.labels[over] for result in results}) < 2:
        return []
    rows = []
    for value in dict.fromkeys(result.labels[by] for result in results):
        group = [result for result in results if result.labels[by] == value]
        means = [mean_scores(result.scored) for result in group]
        averages = {name: mean([each[name] for each in means]) for name in means[0]}
        labels = {**group[0].labels, over: f"average over {over}s"}
        rows.append(Row(labels, None, _with_mean(averages)))
    return rows


def markdown_table(labels: Sequence[str], scores: Sequence[str], rows: Sequence[Row]) -> str:
    """A table in Markdown: columns for labels, for the number of cases n, and for scores.

    Args:
        labels: names of the labels to show.
        scores: names of the scores to show, with two decimals; a dash for those that a row lacks.
        rows: from top to bottom.

    Example:
        >>> rows = [Row({"method": "none", "lr": None}, 2, {"dice": 75.0}, {"dice": (70.0, 80.0)})]
        >>> print(markdown_table(["method", "lr"], ["dice"], rows))
        | method | lr | n | dice [95% interval] |
        |---|---|--:|--:|
        | none | - | 2 | 75.00 [70.00, 80.00] |
    """
    with_interval = {name for row in rows for name in row.intervals}
    heads = [f"{name} [95% interval]" if name in with_interval else name for name in scores]
    lines = [
        _line([*labels, "n", *heads]),
        f"|{'---|' * len(labels)}{'--:|' * (1 + len(scores))}",
    ]
    for row in rows:
        cells = [_text(row.labels[name]) for name in labels]
        lines.append(_line([*cells, _text(row.n), *(_score(row, name) for name in scores)]))
    return "\n".join(lines)


def _with_mean(scores: Mapping[str, float]) -> dict[str, float]:
    return {**scores, MEAN: sum(scores.values()) / len(scores)}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(label: Label) -> str:
    if label is None:
        return "-"
    return f"{label:g}" if isinstance(label, float) else str(label)


def _score(row: Row, name: str) -> str:
    if name not in row.scores:
        return "-"
    text = f"{row.scores[name]:.2f}"
    if name not in row.intervals:
        return text
    interval = row.intervals[name]
    return f"{text} [{'-' if interval is None else f'{interval[0]:.2f}, {interval[1]:.2f}'}]"
