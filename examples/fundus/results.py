"""Results of an experiment as JSON for programs and as a Markdown table for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.common.bootstrap import bootstrap_interval
from examples.fundus.adaptation import (
    LEARNING_METHODS,
    Stream,
    parse_statistics,
    statistics_of,
)
from examples.fundus.metrics import mean
from gradkit.tta import Mixed

RESULT_FILES = ("results.json", "table.md", "figure.png", "alignment.png")
"""All that commands write about one run, straight into the folder of their results."""


@dataclass(frozen=True)
class Result:
    """One method on one pair of centres.

    Attributes:
        source: centre of the training.
        target: centre of the test.
        method: one of `adaptation.METHODS`.
        statistics: where normalisation took mean and variance: `source`, `test`, `mixed:SHARE`.
        lr: learning rate; None for a method that does not learn.
        seed: of the experiment.
        stream: the scores.
    """

    source: str
    target: str
    method: str
    statistics: str
    lr: float | None
    seed: int
    stream: Stream

    @property
    def mean(self) -> float:
        """Mean of disc and cup Dice over images, %."""
        return (self.stream.disc + self.stream.cup) / 2

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the scores of every image."""
        return {
            "source": self.source,
            "target": self.target,
            "method": self.method,
            "statistics": self.statistics,
            "lr": self.lr,
            "seed": self.seed,
            "n": len(self.stream.scores),
            "disc": self.stream.disc,
            "cup": self.stream.cup,
            "mean": self.mean,
            "images": [asdict(score) for score in self.stream.scores],
        }


def make_result(
    source: str, target: str, method: str, statistics: str, lr: float, seed: int, stream: Stream
) -> Result:
    """A result that states what the method really used of the chosen statistics and `lr`."""
    used_lr = lr if method in LEARNING_METHODS else None
    used_statistics = statistics_of(method, statistics)
    return Result(source, target, method, used_statistics, used_lr, seed, stream)


def remove_results(directory: Path) -> bool:
    """Removes the results of an earlier run, beside which those of another would be misread.

    Returns:
        Whether there were any.
    """
    found = [directory / name for name in RESULT_FILES if (directory / name).exists()]
    for path in found:
        path.unlink()
    return bool(found)


def write_json(results: Sequence[Result], path: Path) -> None:
    """Writes a JSON list of results."""
    path.write_text(json.dumps([result.as_json() for result in results], indent=1) + "\n")


def markdown_table(
    results: Sequence[Result], seed: int, in_domain: tuple[str, int, float, float] | None = None
) -> str:
    """A table with a row per pair and method, and the averages over targets.

    Args:
        results: in the order of the rows.
        seed: of the bootstrap.
        in_domain: source, number of images, disc and cup Dice (%) of the unadapted model on
            images of its own centre that the training did not see; a row for comparison.
    """
    lines = [
        "| source | target | method | statistics | lr | n | disc | cup | mean [95% interval] |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    if in_domain is not None:
        source, n, disc, cup = in_domain
        lines.append(_row(source, f"{source} (in domain)", "none", "source", None, n, disc, cup))
    for result in results:
        stream = result.stream
        scores = [score.mean for score in stream.scores]
        interval = bootstrap_interval(scores, seed) if len(scores) > 1 else None
        lines.append(
            _row(
                result.source,
                result.target,
                result.method,
                result.statistics,
                result.lr,
                len(stream.scores),
                stream.disc,
                stream.cup,
                "-" if interval is None else f"{interval[0]:.2f}, {interval[1]:.2f}",
            )
        )
    if len({result.target for result in results}) > 1:
        for method in dict.fromkeys(result.method for result in results):
            group = [result for result in results if result.method == method]
            disc = mean([result.stream.disc for result in group])
            cup = mean([result.stream.cup for result in group])
            like = group[0]
            target = "average over targets"
            lines.append(
                _row(like.source, target, method, like.statistics, like.lr, None, disc, cup)
            )
    lines += [
        "",
        "Dice in %. The interval is a percentile bootstrap over the images of a target, which "
        "holds for this source model and this order of images: it does not cover how results "
        "vary between trainings.",
    ]
    note = confounding_note(results)
    if note is not None:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def confounding_note(results: Sequence[Result]) -> str | None:
    """A sentence where ptbn, which does not learn, and methods that do differ in statistics too.

    Only with the same statistics is the gap between them what learning does.
    """
    statistics = {result.method: result.statistics for result in results}
    learning = [method for method in statistics if method in LEARNING_METHODS]
    if "ptbn" not in statistics or not learning:
        return None
    chosen = statistics[learning[0]]
    if parse_statistics(chosen) in ("test", Mixed(0.0)):
        return None
    names = " and ".join(learning)
    return (
        f"Statistics differ: test for ptbn, {chosen} for {names}. The gap between these rows is "
        f"due to statistics and learning together; with `--statistics test` it is due to learning."
    )


def _row(
    source: str,
    target: str,
    method: str,
    statistics: str,
    lr: float | None,
    n: int | None,
    disc: float,
    cup: float,
    interval: str | None = None,
) -> str:
    cells = [source, target, method, statistics]
    cells += ["-" if lr is None else f"{lr:g}", "-" if n is None else str(n)]
    cells += [f"{disc:.2f}", f"{cup:.2f}", f"{(disc + cup) / 2:.2f}"]
    if interval is not None:
        cells[-1] += f" [{interval}]"
    return f"| {' | '.join(cells)} |"
