"""One line for each method from its trainings: means, differences to plain training, intervals."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.alignment.intervals import mean_interval, paired_interval
from benchmarks.sharpness.methods import REFERENCE

Row = Mapping[str, Any]
MEASURES = ("fit", "loss", "sharpness", "eigenvalue", "trace", "gradients")
"""What is averaged over seeds."""


def steps_of_as_many_gradients(steps: int, gradients: float) -> int:
    """The steps of plain training with as many gradients, which are rounded to a tenth a step."""
    return round(steps * round(gradients, 1))


def summarise(rows: Sequence[Row], steps: int) -> list[dict[str, Any]]:
    """For each method and variant the accuracy, and the differences to plain training, in pairs.

    Rows of the same method and variant are in the order of their seeds. A training that failed
    leaves an error in the place of numbers.

    Args:
        rows: Those of the trainings.
        steps: The steps of a training, by which "longer" ones are known.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["steps"]), []).append(row)
    plain = {key[2]: own for key, own in groups.items() if key[0] == REFERENCE}
    lines: list[dict[str, Any]] = []
    for (name, variant, length), own in groups.items():
        error = next((row["error"] for row in own if row["error"]), None)
        line: dict[str, Any] = {
            "method": name, "variant": variant, "steps": length, "rho": own[0]["rho"],
            "n": len(own), "error": error,
        }  # fmt: skip
        lines.append(line)
        if error:
            continue
        line |= {measure: mean(row[measure] for row in own) for measure in MEASURES}
        values = [row["accuracy"] for row in own]
        line["accuracy"] = mean_interval(values)._asdict()
        if name != REFERENCE or variant != "default":
            line["difference"] = paired_interval(
                values, [row["accuracy"] for row in plain[steps]]
            )._asdict()
        same_cost = plain.get(steps_of_as_many_gradients(steps, line["gradients"]))
        if name != REFERENCE and same_cost:
            line["at equal gradients"] = paired_interval(
                values, [row["accuracy"] for row in same_cost]
            )._asdict()
    return lines
