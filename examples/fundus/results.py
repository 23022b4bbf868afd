"""Results of an adaptation: which labels and scores they have, and their table."""

from collections.abc import Sequence

from examples.common import results as common
from examples.common.adaptation import Stream, parse_statistics
from examples.common.results import MEAN, Result
from examples.fundus.methods import METHODS
from examples.fundus.sample import STRUCTURES
from gradkit.tta import Mixed

RESULT_FILES = ("results.json", "table.md", "figure.png", "alignment.png")
"""All that commands write about one run, straight into the folder of their results."""

LABELS = ("source", "target", "method", "statistics", "lr")
SCORES = (*STRUCTURES, MEAN)


def make_result(
    source: str, target: str, method: str, statistics: str, lr: float, seed: int, stream: Stream
) -> Result:
    """A result that states what the method really used of the chosen statistics and `lr`.

    Args:
        source: centre of the training.
        target: centre of the test.
        method: one of `METHODS`.
        statistics: where normalisation was to take mean and variance.
        lr: learning rate that was chosen.
        seed: of the experiment.
        stream: the scores.
    """
    known = METHODS[method]
    labels = {
        "source": source,
        "target": target,
        "method": method,
        "statistics": statistics if known.statistics is None else known.statistics,
        "lr": lr if known.learns else None,
        "seed": seed,
    }
    return Result(labels, stream.scores)


def markdown_table(
    results: Sequence[Result],
    seed: int,
    in_domain: tuple[str, int, dict[str, float]] | None = None,
) -> str:
    """A table with a row per pair and method, and the averages over targets.

    Args:
        results: in the order of the rows.
        seed: of the bootstrap.
        in_domain: source, number of images, and Dice (%) by structure of the unadapted model on
            images of its own centre that the training did not see; a row for comparison.
    """
    rows = [common.result_row(result, seed) for result in results]
    rows += common.average_rows(results, over="target", by="method")
    if in_domain is not None:
        source, n, scores = in_domain
        values = (source, f"{source} (in domain)", "none", "source", None)
        rows.insert(0, common.scored_row(dict(zip(LABELS, values, strict=True)), n, scores))
    lines = [common.markdown_table(LABELS, SCORES, rows)]
    if any(row.scores for row in rows):
        lines += [
            "",
            "Dice in %. The interval is a percentile bootstrap over the images of a target, which "
            "holds for this source model and this order of images: it does not cover how results "
            "vary between trainings.",
        ]
    for note in (labels_note(results), confounding_note(results)):
        if note is not None:
            lines += ["", note]
    return "\n".join(lines) + "\n"


def labels_note(results: Sequence[Result]) -> str | None:
    """A sentence where images have no masks, and so no scores."""
    cases = sum(len(result.cases) for result in results)
    scored = sum(len(result.scored) for result in results)
    if scored == cases:
        return None
    if scored == 0:
        return f"No scores: none of the {cases} images has a mask."
    return f"Scored: {scored} of {cases} images; the others have no mask."


def confounding_note(results: Sequence[Result]) -> str | None:
    """A sentence where ptbn, which does not learn, and methods that do differ in statistics too.

    Only with the same statistics is the gap between them what learning does.
    """
    statistics = {
        str(result.labels["method"]): str(result.labels["statistics"]) for result in results
    }
    learning = [method for method in statistics if METHODS[method].learns]
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
