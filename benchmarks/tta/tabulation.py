"""From the files of jobs to the record of a table."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.fundus import pooled_interval
from benchmarks.tta.jobs import Job, Record
from benchmarks.tta.selection import best, choose, left_out
from benchmarks.tta.summary import (
    Line,
    Pair,
    Scores,
    by_seed,
    by_target,
    compare,
    details,
    pair_means,
    scores_of_pairs,
)
from benchmarks.tta.tables import REFERENCES, Table
from benchmarks.tta.variants import Variant
from examples.common.usage import require

BOOTSTRAP_SEED = 0


def tabulate(table: Table, jobs: Sequence[Job]) -> dict[str, Any]:
    """The part of a table's record that comes from results.

    Variants of which a job failed have no line.

    Raises:
        UsageError: no variant, or not every reference, has all its results.
    """
    done: dict[str, tuple[Variant, list[Record]]] = {}
    incomplete = set()
    for job in jobs:
        name = job.variant.name
        record = job.result()
        if record is None:
            incomplete.add(name)
        else:
            done.setdefault(name, (job.variant, []))[1].append(record)
    whole = {name: found for name, found in done.items() if name not in incomplete}
    if table == "figure4":
        require(bool(whole), "every variant failed; see above")
        cosines = {name: _cosines_of_pairs(records) for name, (_, records) in whole.items()}
        lines = [
            _cosines(whole[name][0], own, cosines.get(_without_look_ahead(name)))
            for name, own in cosines.items()
        ]
        return {"images": _counts(whole), "lines": lines}
    missing = [name for name in REFERENCES if name not in whole]
    require(not missing, f"{' and '.join(missing)} failed, with which all others are compared")
    scores = {
        (name, prediction): scores_of_pairs(records, prediction)
        for name, (variant, records) in whole.items()
        for prediction in variant.predictions
    }
    references = {name: scores[name, "after"] for name in REFERENCES}
    lines = [
        {
            "variant": name,
            "title": whole[name][0].title,
            "prediction": prediction,
            "product": whole[name][0].product,
            "objectives": whole[name][0].objectives,
            **compare(own, references, BOOTSTRAP_SEED),
            **details(whole[name][1]),
            "seeds": by_seed(whole[name][1], prediction),
            "pairs": [
                {"source": source, "target": target, "mean": round(value, 3)}
                for (source, target), value in pair_means(own).items()
            ],
        }
        for (name, prediction), own in scores.items()
    ]
    found = {"images": _counts(whole), "lines": lines}
    if table == "6":
        titles = {(line["variant"], line["prediction"]): line for line in lines}
        product = {
            f"{titles[key]['title']}, {key[1]}": own
            for key, own in scores.items()
            if titles[key]["product"]
        }
        found |= _choices(product, references)
    return found


def _counts(whole: Mapping[str, tuple[Variant, list[Record]]]) -> dict[str, int]:
    """The number of images of each target."""
    _, records = next(iter(whole.values()))
    return {record["target"]: len(record["images"]) for record in records}


def _choices(product: Mapping[str, Scores], references: Mapping[str, Scores]) -> dict[str, Any]:
    """For each target what is chosen without it, and what that comes to."""
    pairs = list(next(iter(references.values())))
    targets = list(dict.fromkeys(target for _, target in pairs))
    if len(targets) < 3 or not product:
        return {"chosen": [], "selected": []}
    chosen = {target: choose(product, target) for target in targets}
    hindsight = {target: best(product, target) for target in targets}

    def on(scores: Scores, target: str) -> float:
        return mean(value for (_, own), value in pair_means(scores).items() if own == target)

    return {
        "chosen": [
            {
                "target": target,
                "chosen": chosen[target],
                "score": on(product[chosen[target]], target),
                "best": hindsight[target],
                "best_score": on(product[hindsight[target]], target),
                **{name: on(scores, target) for name, scores in references.items()},
            }
            for target in targets
        ],
        "selected": [
            {"title": title, **compare(left_out(product, choices), references, BOOTSTRAP_SEED)}
            for title, choices in (
                ("chosen without the target", chosen),
                ("best in hindsight", hindsight),
            )
        ],
    }


def _without_look_ahead(name: str) -> str | None:
    """The variant of the same objective at the weights themselves; None if this one is."""
    for aligned, plain in (("ent-con-", "ent-"), ("con-ent-", "con-")):
        if name.startswith(aligned):
            return plain + name.removeprefix(aligned)
    return None


def _cosines_of_pairs(records: Sequence[Record]) -> Scores:
    """The cosine with the gradient of the labels of each image of each pair, mean over seeds."""
    cosines: dict[Pair, list[list[float]]] = {}
    for record in records:
        values = [image["empirical"] for image in record["images"]]
        cosines.setdefault((record["source"], record["target"]), []).append(values)
    return {
        pair: [mean(image) for image in zip(*own, strict=True)] for pair, own in cosines.items()
    }


def _cosines(variant: Variant, cosines: Scores, plain: Scores | None) -> Line:
    """Cosines by source, their interval, how often above 0, and the gain on those of `plain`."""
    sources = dict.fromkeys(source for source, _ in cosines)
    every = [value for own in cosines.values() for value in own]
    gain: dict[str, Any] = {}
    if plain is not None:
        gains = {
            pair: [a - b for a, b in zip(own, plain[pair], strict=True)]
            for pair, own in cosines.items()
        }
        gain = {
            "empirical_gain": mean(mean(own) for own in gains.values()),
            "empirical_gain_interval": _interval(gains),
        }
    return {
        "variant": variant.name,
        "title": variant.title,
        "empirical_by_source": {
            source: mean(mean(own) for (other, _), own in cosines.items() if other == source)
            for source in sources
        },
        "empirical_interval": _interval(cosines),
        "empirical_positive": mean(value > 0 for value in every),
        **gain,
    }


def _interval(values: Scores) -> tuple[float, float] | None:
    return pooled_interval(list(by_target(values).values()), BOOTSTRAP_SEED)
