"""Results of methods on test images: scores by site and seed, and their tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from examples.common import results as common
from examples.common.bootstrap import bootstrap_interval
from examples.common.datasets import Sample
from examples.common.metrics import SURFACE_SCORES, Scorer, mean, surface_scores_of
from examples.common.results import Interval, Result, Row
from examples.common.scores import CaseScores, mean_scores, score_cases
from examples.semi.task import Task

RESULT_FILES = (
    "results.json", "student.json", "table.md", "curves.png", "predictions.png", "tsne.png",
)  # fmt: skip
"""All that commands write about one run, straight into the folder of their results."""

LABELS = ("method", "site")
NOTE = (
    "Dice and Jaccard in %, distances in pixels of {size}² images, means over images, of the mean "
    "teacher at its best validation on the labelled site. Where prediction and mask are both "
    "empty, overlaps are 100 and distances 0; where one of them is, 0 and the image's diagonal. "
    "Intervals are percentile bootstraps over examinations for these trainings; they do not cover "
    "how results vary between trainings."
)
RECONSTRUCTED = (
    "`divergence` and `dim` are a reconstruction from DiM's abstract, whose equations are not "
    "public to this project."
)


def score_site(
    task: Task,
    model: nn.Module,
    samples: Dataset[Sample],
    device: torch.device,
    labels: Mapping[str, common.Label],
) -> Result:
    """Scores of a model on the test images of a site."""
    score: Scorer = surface_scores_of(task.structures)
    return Result(labels, score_cases(model, samples, device, score))


def score_sites(
    task: Task,
    model: nn.Module,
    sites: Mapping[str, Dataset[Sample]],
    device: torch.device,
    method: str,
    seed: int,
) -> list[Result]:
    """Scores of a model on the test images of each site."""
    return [
        score_site(task, model, samples, device, {"method": method, "site": site, "seed": seed})
        for site, samples in sites.items()
    ]


def average_over_seeds(results: Sequence[Result]) -> Result:
    """Each case's mean scores over results that are alike but for their seed."""
    cases = [
        CaseScores(
            same[0].case,
            {name: mean([case.scores[name] for case in same]) for name in same[0].scores},
        )
        for same in zip(*(result.cases for result in results), strict=True)
    ]
    return Result(results[0].labels, cases)


def by_examination(task: Task, cases: Sequence[CaseScores], score: str = "dice") -> list[float]:
    """The mean score of each examination."""
    values: dict[str, list[float]] = {}
    for case in cases:
        path = Path(case.case)
        examination = f"{path.parts[0]}/{task.case(path.stem)}"
        values.setdefault(examination, []).append(case.scores[score])
    return [mean(scores) for scores in values.values()]


def interval(values: Sequence[float], seed: int) -> Interval:
    """A bootstrap interval of the mean; None for a single value."""
    return bootstrap_interval(values, seed) if len(values) > 1 else None


def markdown_table(
    task: Task,
    results: Sequence[Result],
    size: int,
    seed: int = 0,
    students: Sequence[Result] = (),
) -> str:
    """Tables of the means over seeds by method and site, and of the seeds by method.

    Args:
        task: what the results are of.
        results: of all methods, sites and seeds.
        size: side of the images, pixels.
        seed: of the bootstrap.
        students: the results of the students, for a column.
    """
    rows = []
    groups: dict[str, list[Result]] = {}
    for method in _values(results, "method"):
        merged = []
        for site in _values(results, "site"):
            same = _select(results, method=method, site=site)
            if same:
                merged.append(average_over_seeds(same))
        groups[method] = merged
        rows += [_row(task, dict(each.labels), [each], seed) for each in merged]
        if len(merged) > 1:
            rows.append(_row(task, {"method": method, "site": "average over sites"}, merged, seed))
    lines = [common.markdown_table(LABELS, SURFACE_SCORES, rows), ""]
    if len(groups) > 1 or len(_values(results, "seed")) > 1:
        lines += [*_seed_table(task, results, groups, seed, students), ""]
    lines.append(NOTE.format(size=size))
    if any(method.split(":")[0] in ("divergence", "dim") for method in groups):
        lines += ["", RECONSTRUCTED]
    return "\n".join(lines) + "\n"


def _row(task: Task, labels: dict[str, common.Label], merged: Sequence[Result], seed: int) -> Row:
    means = [mean_scores(result.cases) for result in merged]
    scores = {name: mean([each[name] for each in means]) for name in means[0]}
    values = [value for result in merged for value in by_examination(task, result.cases)]
    count = sum(len(result.cases) for result in merged)
    return Row(labels, count, scores, {"dice": interval(values, seed)})


def _seed_table(
    task: Task,
    results: Sequence[Result],
    groups: Mapping[str, Sequence[Result]],
    seed: int,
    students: Sequence[Result],
) -> list[str]:
    """Dice over all sites by seed, and the difference from the baseline, paired by examination."""
    seeds = _values(results, "seed")
    baseline = "fixmatch" if "fixmatch" in groups else next(iter(groups))
    lines = [
        f"Dice, average over sites, of each training, and its difference from `{baseline}`:",
        "",
        f"| method | {' | '.join(f'seed {each}' for each in seeds)} | mean | student | "
        "difference [95% interval] |",
        f"|---|{'--:|' * (len(seeds) + 3)}",
    ]
    reference = [by_examination(task, result.cases) for result in groups[baseline]]
    for method, merged in groups.items():
        cells = []
        for each in seeds:
            own = _select(results, method=method, seed=each)
            cells.append(f"{mean([result.score('dice') for result in own]):.2f}" if own else "-")
        total = mean([mean_scores(result.cases)["dice"] for result in merged])
        pairs = zip(merged, reference, strict=True)
        changes = [
            one - other
            for result, values in pairs
            for one, other in zip(by_examination(task, result.cases), values, strict=True)
        ]
        between = interval(changes, seed)
        shown = "-" if between is None else f"{between[0]:+.2f}, {between[1]:+.2f}"
        difference = "-" if method == baseline else f"{mean(changes):+.2f} [{shown}]"
        own = [result.score("dice") for result in _select(students, method=method)]
        cells += [f"{total:.2f}", f"{mean(own):.2f}" if own else "-", difference]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _values(results: Sequence[Result], label: str) -> list[str]:
    return list(dict.fromkeys(str(result.labels[label]) for result in results))


def _select(results: Sequence[Result], **labels: str) -> list[Result]:
    return [
        result
        for result in results
        if all(str(result.labels[name]) == value for name, value in labels.items())
    ]
