"""From the scores of images to the lines of a table: means, intervals, sign tests, worst pairs.

The unit is an image of a target. Its score is the mean over seeds and sources, so that an image
which several source models predict counts once, not as several independent ones.
"""

from collections.abc import Mapping, Sequence
from math import comb
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.fundus import pooled_interval
from benchmarks.tta.jobs import Record, scores_of

Pair = tuple[str, str]
"""Source and target."""
Scores = Mapping[Pair, Sequence[float]]
"""Of each image, in the order of the stream: Dice in %, mean of disc and cup."""
Line = dict[str, Any]


class SignTest(NamedTuple):
    """How many differences are above and below 0, and how surprising that is.

    Attributes:
        better: differences above 0.
        worse: differences below 0.
        p: probability of a split at least as uneven if both signs are equally likely.
    """

    better: int
    worse: int
    p: float


def sign_test(differences: Sequence[float]) -> SignTest:
    """The two-sided sign test of paired differences; those that are 0 do not count.

    With n differences of which the rarer sign has k: p = min(1, 2·Σ_{i ≤ k} C(n, i)/2ⁿ), computed
    exactly.

    Example:
        >>> sign_test([1.0, 2.0, 0.5, -1.0, 0.0, 3.0])
        SignTest(better=4, worse=1, p=0.375)
    """
    better = sum(value > 0 for value in differences)
    worse = sum(value < 0 for value in differences)
    total = better + worse
    tail = sum(comb(total, i) for i in range(min(better, worse) + 1))
    return SignTest(better, worse, min(1.0, 2 * tail / 2**total))


def mean_over_seeds(records: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each image over records, which have the same images."""
    return [mean(image) for image in zip(*records, strict=True)]


def by_target(scores: Scores) -> dict[str, list[float]]:
    """The score of each image of each target, mean over sources."""
    targets = dict.fromkeys(target for _, target in scores)
    return {
        target: mean_over_seeds([own for (_, other), own in scores.items() if other == target])
        for target in targets
    }


def pair_means(scores: Scores) -> dict[Pair, float]:
    """The mean score of each pair."""
    return {pair: mean(values) for pair, values in scores.items()}


def compare(scores: Scores, references: Mapping[str, Scores], seed: int) -> Line:
    """One line: the mean score by source and in all, and the differences to references.

    Args:
        scores: of one variant, for every pair of centres.
        references: by name, for the same pairs and images; the worst pair is that with the lowest
            difference to the first.
        seed: of the bootstrap.
    """
    means = pair_means(scores)
    sources = dict.fromkeys(source for source, _ in means)
    groups = by_target(scores)
    against: Line = {}
    for name, reference in references.items():
        differences = [
            [a - b for a, b in zip(own, other, strict=True)]
            for own, other in zip(groups.values(), by_target(reference).values(), strict=True)
        ]
        each = [value for group in differences for value in group]
        against[name] = {
            "difference": mean(map(mean, differences)),
            "interval": pooled_interval(differences, seed),
            **sign_test(each)._asdict(),
        }
    first = pair_means(next(iter(references.values())))
    worst = min(means, key=lambda pair: means[pair] - first[pair])
    return {
        "sources": {
            source: mean(value for (own, _), value in means.items() if own == source)
            for source in sources
        },
        "mean": mean(means.values()),
        "interval": pooled_interval(list(groups.values()), seed),
        "against": against,
        "worst": {
            "source": worst[0],
            "target": worst[1],
            "difference": means[worst] - first[worst],
        },
    }


def details(records: Sequence[Record]) -> Line:
    """What the jobs of a variant tell beside scores, means over jobs: cost, cosines, factors."""
    found: Line = {
        name: mean(record[name] for record in records)
        for name in ("forwards", "backwards", "megabytes")
    }
    times = sorted(
        record["milliseconds"] for record in records if record["milliseconds"] is not None
    )
    found["milliseconds"] = times[len(times) // 2] if times else None
    for name in ("cosine", "lr_scale", "empirical"):
        values = [image[name] for record in records for image in record["images"] if name in image]
        found[name] = mean(values) if values else None
    return found


def scores_of_pairs(records: Sequence[Record], prediction: str) -> dict[Pair, list[float]]:
    """The scores of a variant by pair, mean over seeds, from the records of all its jobs."""
    pairs = dict.fromkeys((record["source"], record["target"]) for record in records)
    return {
        pair: mean_over_seeds(
            [
                scores_of(record, prediction)
                for record in records
                if (record["source"], record["target"]) == pair
            ]
        )
        for pair in pairs
    }


def by_seed(records: Sequence[Record], prediction: str) -> list[float]:
    """The mean over pairs of each seed."""
    seeds = dict.fromkeys(record["seed"] for record in records)
    return [
        mean(mean(scores_of(record, prediction)) for record in records if record["seed"] == seed)
        for seed in seeds
    ]
