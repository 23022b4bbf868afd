"""The tables of the fusion, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.composition.gates import all_gates, cues, cup_at, weights
from benchmarks.composition.student import STUDENTS
from benchmarks.composition.variants import VARIANTS
from benchmarks.fundus import pooled_interval
from benchmarks.tables import with_ends
from examples.common.metrics import mean

BASELINE, PTBN, FUSED, GATED = "No Adapt", "PTBN", "fused (fixed per class)", "gated"
WORSE = 2.0
"""Points of Dice by which an image is counted as worse."""

Record = dict[str, Any]
Key = tuple[str, str]


def by_pair(records: Iterable[Record], part: str) -> dict[Key, Record]:
    """The results of a part, by source and target."""
    return {(r["source"], r["target"]): r for r in records if r["part"] == part}


def gains(record: Record, name: str) -> list[list[float]]:
    """Dice of disc and cup minus that without adaptation, for each image of a pair."""
    return [
        [new - old for new, old in zip(each["scores"][name], each["scores"][BASELINE], strict=True)]
        for each in record["images"]
    ]


def mean_gain(record: Record, name: str) -> float:
    """The gain of a pair: the mean over its images, and over disc and cup."""
    return mean([mean(image) for image in gains(record, name)])


def variant_row(name: str, records: Sequence[Record]) -> str:
    """A variant's averages over pairs."""
    differences = [gains(record, name) for record in records]
    means = [[mean(image) for image in pair] for pair in differences]
    pairs = [mean(pair) for pair in means]
    ends = pooled_interval(means, records[0]["made_with"]["seed"])
    dice = mean([mean([mean(e["scores"][name]) for e in r["images"]]) for r in records])
    disc, cup = (mean([mean([image[c] for image in pair]) for pair in differences]) for c in (0, 1))
    worse = mean([mean([float(value < -WORSE) for value in pair]) for pair in means])
    variant = {**VARIANTS, **STUDENTS}[name]
    cost = f"{variant.passes}" + (f" + {variant.backwards} back" if variant.backwards else "")
    return (
        f"| {name} | {cost} | {dice:.2f} | {with_ends(mean(pairs), ends, sign='+')} | "
        f"{disc:+.2f} | {cup:+.2f} | {min(pairs):+.2f} to {max(pairs):+.2f} | {100 * worse:.0f}% |"
    )


def variant_table(records: Sequence[Record], names: Iterable[str]) -> list[str]:
    """A row for each variant."""
    return [
        "| variant | forwards | Dice | gain [95%] | disc | cup | pairs | images worse by > 2 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(variant_row(name, records) for name in names),
    ]


def pair_table(pairs: Mapping[Key, Record]) -> list[str]:
    """A row for each pair."""
    names = (PTBN, FUSED, GATED)
    lines = [
        f"| source → target | n | No Adapt | {' | '.join(names)} |",
        "|---|--:|--:|" + "--:|" * len(names),
    ]
    for (source, target), record in pairs.items():
        baseline = mean([mean(each["scores"][BASELINE]) for each in record["images"]])
        cells = " | ".join(f"{mean_gain(record, name):+.2f}" for name in names)
        lines.append(
            f"| {source} → {target} | {len(record['images'])} | {baseline:.2f} | {cells} |"
        )
    return lines


def gate_table(pairs: Mapping[Key, Record], shifted: Mapping[Key, Record]) -> list[str]:
    """A row for each further gate, with the gain of the whole prediction."""
    groups = {pair: cues(record["images"]) for pair, record in pairs.items()}
    own = {source: cues(record["images"]) for (source, _), record in shifted.items()}
    lines = [
        "| gate | gain | worst pair | factors of 30·ΔE, 4.5·ΔZ, 1, log shift; from to |",
        "|---|--:|--:|---|",
    ]
    for name, factors in all_gates(groups, own).items():
        found = []
        for pair, record in pairs.items():
            cup = cup_at(groups[pair].cup, weights(groups[pair], factors[pair]))
            old = [each["scores"][BASELINE][1] for each in record["images"]]
            disc = mean([image[0] for image in gains(record, GATED)])
            found.append((disc + float(cup.mean()) - mean(old)) / 2)
        ends = [
            f"{min(column):.2f} to {max(column):.2f}"
            if max(column) > min(column)
            else f"{column[0]:g}"
            for column in zip(*(each.tolist() for each in factors.values()), strict=True)
        ]
        lines.append(f"| {name} | {mean(found):+.2f} | {min(found):+.2f} | {'; '.join(ends)} |")
    return lines


def report(records: Sequence[Record]) -> str:
    """All tables of the results that are there."""
    pairs = by_pair(records, "pairs")
    lines = []
    if pairs:
        lines += [
            f"Dice in %, mean of disc and cup, and its gain over No Adapt; {len(pairs)} pairs of "
            "centres.",
            "",
            *variant_table(list(pairs.values()), VARIANTS),
            "",
            *pair_table(pairs),
            "",
            "Other gates, with the cup's Dice interpolated between weights that are multiples of "
            "0.1:",
            "",
            *gate_table(pairs, by_pair(records, "shifted")),
            "",
        ]
    students = {}
    for pair, record in by_pair(records, "distilled").items():
        if pair in pairs:
            both = zip(pairs[pair]["images"], record["images"], strict=True)
            images = [{"scores": {**old["scores"], **new["scores"]}} for old, new in both]
            students[pair] = {**pairs[pair], "images": images}
    if students:
        lines += [
            f"Learning from the fusion, {len(students)} pairs:",
            "",
            *variant_table(list(students.values()), (BASELINE, FUSED, GATED, *STUDENTS)),
            "",
        ]
    alone = [pair for pair in by_pair(records, "distilled") if pair not in pairs]
    if alone:
        lines += [
            f"Of {len(alone)} pair(s) that learn there is no table, since what they are compared "
            "with is not there: run --parts pairs, too.",
            "",
        ]
    machines = {tuple(record["machine"].items()) for record in records}
    lines += [
        "Intervals are percentile bootstraps over images, within pairs. They hold for these source "
        "models, and do not cover how results vary between trainings.",
        "",
        *(
            f"Machine: {', '.join(f'{key} {value}' for key, value in machine)}."
            for machine in sorted(machines)
        ),
    ]
    return "\n".join(lines) + "\n"
