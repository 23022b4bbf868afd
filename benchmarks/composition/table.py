"""The tables of the fusion, as Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.composition.variants import VARIANTS
from benchmarks.fundus import pooled_interval
from examples.common.metrics import mean

BASELINE = "No Adapt"
WORSE = 2.0
"""Points of Dice by which an image is counted as worse."""


def gains(record: dict[str, Any], name: str) -> list[list[float]]:
    """Dice of disc and cup minus that without adaptation, for each image of a pair."""
    return [
        [new - old for new, old in zip(each["scores"][name], each["scores"][BASELINE], strict=True)]
        for each in record["images"]
    ]


def row(name: str, records: Sequence[dict[str, Any]], seed: int) -> str:
    """A variant's averages over pairs."""
    differences = [gains(record, name) for record in records]
    means = [[mean(image) for image in pair] for pair in differences]
    by_pair = [mean(pair) for pair in means]
    low, high = pooled_interval(means, seed)
    dice = mean([mean([mean(e["scores"][name]) for e in r["images"]]) for r in records])
    classes = [mean([mean([image[c] for image in pair]) for pair in differences]) for c in (0, 1)]
    worse = mean([mean([float(value < -WORSE) for value in pair]) for pair in means])
    return (
        f"| {name} | {VARIANTS[name].passes} | {dice:.2f} | {mean(by_pair):+.2f} [{low:+.2f}, "
        f"{high:+.2f}] | {classes[0]:+.2f} | {classes[1]:+.2f} | {min(by_pair):+.2f} to "
        f"{max(by_pair):+.2f} | {100 * worse:.0f}% |"
    )


def report(records: Sequence[dict[str, Any]], seed: int) -> str:
    """All tables of the results that are there."""
    pairs = [record for record in records if record["part"] == "pairs"]
    lines = [
        f"Gain in Dice (points, mean of disc and cup) over No Adapt, {len(pairs)} pairs.",
        "",
        "| variant | forwards | Dice | gain [95%] | disc | cup | pairs | worse by > 2 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(row(name, pairs, seed) for name in VARIANTS),
    ]
    return "\n".join(lines) + "\n"
