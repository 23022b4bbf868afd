"""The comparison as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.sharpness import digits
from benchmarks.sharpness.methods import METHODS, REFERENCE
from benchmarks.tables import Column, Row, plus_minus, table_of


def report(record: Mapping[str, Any]) -> str:
    """The whole report."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    sections = [
        "# Sharpness-aware methods",
        f"Made by `{record['command']}`.\n\nMachine: {machine}.",
        *_digits(record),
        *_landscape(record),
        _failures(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def lines_of(record: Mapping[str, Any], variant: str) -> list[Row]:
    """The lines of all methods in a variant; "chosen" is the default one where that was chosen."""
    lines = [line for line in record["summary"] if not line["error"]]
    default = {line["method"]: line for line in lines if line["variant"] == "default"}
    if variant == "default":
        return list(default.values())
    own = {line["method"]: line for line in lines if line["variant"] == variant}
    failed = {line["method"] for line in record["summary"] if line["error"]} - own.keys()
    return [own.get(name, line) for name, line in default.items() if name not in failed]


def _digits(record: Mapping[str, Any]) -> list[str]:
    setting, steps = record["setting"], record["settings"]["steps"]
    default, chosen = lines_of(record, "default"), lines_of(record, "chosen")
    longer = [line for line in record["summary"] if line["variant"] == "longer"]
    about = (
        f"## Digits with wrong labels\n\nA perceptron of width {digits.WIDTH}, {digits.TRAINING} "
        f"digits of which {100 * digits.WRONG:g}% have a wrong label, {steps} steps of SGD with "
        f"momentum {digits.MOMENTUM:g}, batch {digits.BATCH}. The learning rate {setting['lr']:g} "
        f"and weight decay {setting['weight_decay']:g} are those with which plain SGD is best on "
        "validation digits; methods have the same, and a radius by default and one chosen on "
        "validation digits (BSAM, whose base has no momentum, also a learning rate)."
    )
    return [
        about,
        _by_method(
            default,
            [("radius", _radius), ("accuracy, %", _accuracy), (f"minus {REFERENCE}", _difference)],
        ),
        "With the chosen radius:",
        _by_method(
            chosen,
            [
                ("radius", _radius),
                ("accuracy, %", _accuracy),
                (f"minus {REFERENCE}", _difference),
                (f"minus {REFERENCE} with as many gradients", _at_equal_gradients),
            ],
        ),
        f"Accuracies on {record['test digits']} test digits, means of {default[0]['n']} seeds ± "
        "half of Student's 95% interval; differences are taken in pairs of the same seed. An "
        'interval that contains 0 is called "no difference". The chosen radius has been chosen '
        f"among {len(digits.FACTORS)} by {record['settings']['tuning_seeds']} seeds on "
        "validation digits.",
        "### Flatness and cost",
        _by_method(
            chosen,
            [
                ("training labels learnt, %", lambda row: f"{row['fit']:.1f}"),
                ("training loss", lambda row: f"{row['loss']:.3f}"),
                (f"sharpness at {digits.RADIUS:g}", lambda row: f"{row['sharpness']:.3f}"),
                ("largest eigenvalue", lambda row: f"{row['eigenvalue']:.1f}"),
                ("Hessian trace", lambda row: f"{row['trace']:.0f}"),
                ("gradients a step", lambda row: f"{row['gradients']:.2f}"),
                (f"time / {REFERENCE}", lambda row: f"{record['times'][row['method']]:.2f}"),
            ],
        ),
        "Means over seeds with the chosen radius. The loss is that of all training digits with "
        "their partly wrong labels; sharpness, eigenvalue and trace are `gk.sharpness.report`'s of "
        f"it. Times are those of {digits.TIMED} steps, which all methods take in turn, in "
        "processor time of one thread; the network is so small that bookkeeping is most of it.",
        "### Plain SGD for longer" if longer else "",
        _by_method(
            longer,
            [
                ("steps", lambda row: f"{row['steps']}"),
                ("accuracy, %", _accuracy),
                (f"minus {REFERENCE} of {steps} steps", _difference),
                ("training labels learnt, %", lambda row: f"{row['fit']:.1f}"),
            ],
        ),
    ]


def _landscape(record: Mapping[str, Any]) -> list[str]:
    rows = record["landscape"]
    if not rows:
        return []
    return [
        "## Two wells",
        _by_method(
            rows,
            [
                ("ends in the flat well", lambda row: f"{row['flat']} of {row['starts']}"),
                ("mean distance to its minimum", lambda row: f"{row['distance']:.2f}"),
            ],
        ),
        "From starts in the sharp one. The radius is 0.75, the sharp well's own is 0.6; ASAM, GAM "
        "and BSAM, whose radius is measured otherwise, have another.",
    ]


def _radius(row: Row) -> str:
    rho = row["rho"]
    if rho is None and row["method"] in METHODS:
        rho = METHODS[row["method"]].radius
    return "-" if rho is None else f"{rho:g}"


def _accuracy(row: Row) -> str:
    return _interval(row["accuracy"])


def _difference(row: Row) -> str:
    return _verdict(row.get("difference"))


def _at_equal_gradients(row: Row) -> str:
    return _verdict(row.get("at equal gradients"))


def _verdict(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    shown = _interval(value, "+")
    return f"no difference ({shown})" if value["low"] <= 0 <= value["high"] else f"**{shown}**"


def _by_method(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    return table_of(rows, columns, "method", "method")


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return plus_minus(value["mean"], (value["high"] - value["low"]) / 2, sign)


def _failures(record: Mapping[str, Any]) -> str:
    rows = [*record["summary"], *record["landscape"]]
    failed = {f"- {row['method']}: {row['error']}": None for row in rows if row["error"]}
    return "\n".join(["Failed, at least from one start or seed:", "", *failed]) if failed else ""
