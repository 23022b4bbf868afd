"""The tables as Markdown, in the shape of the paper's and beside its figures."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.tables import Column, table_of, with_ends
from benchmarks.tta.published import DOMAINS, PAIRS, figures_of
from benchmarks.tta.tables import PREDICTIONS
from examples.fundus.objectives import OBJECTIVES

Line = Mapping[str, Any]

HEADINGS = {
    "1": "Table 1: methods and controls",
    "2": "Table 2: objective and learning rate",
    "3": "Table 3: the objectives in each other's place",
    "4": "Table 4: from the cosine to the learning rate",
    "5": "Table 5: pairs of objectives",
    "6": "Table 6: statistics by gradient methods by predictions",
    "figure4": "Figure 4: cosine with the gradient of the labels",
}
_UNITS = (
    "Dice in %, mean of disc and cup. A source's score is the mean over its targets, the average "
    "that over sources. Intervals are 95% percentile bootstraps over images, within targets; an "
    "image counts once, with its mean over source models. They hold for these source models and "
    "this order of images, and do not cover how results vary between trainings."
)
_SIGNS = (
    "Better and worse: images whose score is above and below the reference's, and p of the "
    "two-sided sign test. No p is corrected for the number of rows; of twenty rows that change "
    "nothing one has p < 0.05 on average. The worst pair is that with the lowest difference to No "
    "Adapt."
)
_COST = (
    "Passes are images through the encoder, forwards and backwards, a batch of six views being "
    "six. Milliseconds are the median over images of processor time of one thread (on a GPU, of "
    "time). MB is the most that tensors take which one image makes, without the model and the "
    "adapter's state. Cosines and factors of the learning rate are means over images."
)
_PAPER = (
    "The columns A to E are the paper's ([Chen et al., AAAI 2025](https://arxiv.org/abs/2408.07343)"
    "), by its source domains: other data, four times as many pixels a side, a network twice as "
    "wide that starts from ImageNet. They are no reference for the height of our scores, only for "
    "the differences between rows."
)


def report(record: Mapping[str, Any]) -> str:
    """The whole report of one table."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    table = record["table"]
    body = {"5": _fifth, "6": _sixth, "figure4": _fourth_figure}.get(table, _methods)
    sections = [
        f"# {HEADINGS[table]}",
        f"Made by `{record['command']}`.\n\nMachine: {machine}.",
        _about(record),
        *body(record),
        _failed(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _about(record: Mapping[str, Any]) -> str:
    setting = record["setting"]
    what = "Synthetic centres" if setting["data"] == "synthetic" else "Photographs of"
    shift = f" at strength {setting['shift']:g} of their shift" if "shift" in setting else ""
    images = ", ".join(f"{target} {count}" for target, count in record["images"].items())
    return (
        f"{what} {', '.join(setting['centres'])}{shift}, {setting['size']} pixels a side; "
        f"ResUNet-34 of width {setting['width']}; every centre as source and every other as "
        f"target. Images of each target, from the start of its lists: {images}. Source models of "
        f"{record['seeds']} seed{'s' if record['seeds'] > 1 else ''}. β is {record['lr']:g}."
    )


def _methods(record: Mapping[str, Any]) -> list[str]:
    lines = record["lines"]
    with_paper = any(figures_of(line["variant"]) for line in lines)
    return [
        table(lines, [*_scores(record), *(_paper() if with_paper else [])]),
        _UNITS,
        _PAPER if with_paper else "",
        *_differences(lines),
        *_costs(lines),
    ]


def _differences(lines: Sequence[Line]) -> list[str]:
    return [
        "## Paired differences",
        table(
            lines,
            [
                *_against("none", "No Adapt"),
                *_against("ptbn", "PTBN"),
                ("worst pair", _worst),
            ],
        ),
        _SIGNS,
    ]


def _costs(lines: Sequence[Line]) -> list[str]:
    return [
        "## Cost per image, and alignment",
        table(
            lines,
            [
                ("forwards", lambda line: f"{line['forwards']:.1f}"),
                ("backwards", lambda line: f"{line['backwards']:.1f}"),
                ("ms", lambda line: _number(line["milliseconds"], ".0f")),
                ("MB", lambda line: f"{line['megabytes']:.1f}"),
                ("cosine", lambda line: _number(line["cosine"], "+.2f")),
                ("factor of lr", lambda line: _number(line["lr_scale"], ".2f")),
            ],
        ),
        _COST,
    ]


def _fifth(record: Mapping[str, Any]) -> list[str]:
    found = {tuple(line["objectives"]): line for line in record["lines"] if line["objectives"]}
    names = [name for name in OBJECTIVES if any(name in pair for pair in found)]

    def cell(pseudo: str, auxiliary: str) -> str:
        line = found.get((pseudo, auxiliary))
        paper = PAIRS.get((pseudo, auxiliary))
        ours = "-" if line is None else f"{line['mean']:.2f}"
        return ours if paper is None else f"{ours} ({paper:.2f})"

    def difference(pseudo: str, auxiliary: str) -> str:
        line = found.get((pseudo, auxiliary))
        return "-" if line is None else _difference(line, "ptbn")

    references = [line for line in record["lines"] if not line["objectives"]]
    return [
        table(references, _scores(record)),
        "Below, a row is a pseudo objective and a column the auxiliary one that it is ahead of. In "
        "brackets the paper's averages; the order of its rows is reconstructed, and it has no pair "
        "of an objective with itself.",
        _matrix(names, cell),
        _UNITS,
        "## Minus PTBN",
        _matrix(names, difference),
        *_costs(list(found.values())),
    ]


def _sixth(record: Mapping[str, Any]) -> list[str]:
    product = [line for line in record["lines"] if line["product"]]
    rows = dict.fromkeys(line["title"] for line in product)
    by_key = {(line["title"], line["prediction"]): line for line in product}

    def cell(title: str, prediction: str) -> str:
        line = by_key.get((title, prediction))
        return "-" if line is None else f"{line['mean']:.2f}"

    chosen = record["chosen"]
    sections = [
        table([line for line in record["lines"] if not line["product"]], _scores(record)),
        "Averages of every composition, by prediction: before the step, after it, and the mean "
        "over six views after it.",
        "\n".join(
            [
                f"| statistics, gradient method | {' | '.join(PREDICTIONS)} |",
                "|---|" + "--:|" * len(PREDICTIONS),
                *(
                    f"| {title} | {' | '.join(cell(title, name) for name in PREDICTIONS)} |"
                    for title in rows
                ),
            ]
        ),
        _UNITS,
        "## Chosen without the target",
    ]
    if not chosen:
        return [*sections, "There is no choice with fewer than three centres."]
    return [
        *sections,
        "For each target the composition is taken that is best over the pairs in which that "
        "centre is neither target nor source. The best in hindsight looks at the target's labels, "
        "and is no method.",
        "\n".join(
            [
                "| target | chosen | Dice | best in hindsight | Dice | No Adapt | PTBN |",
                "|---|---|--:|---|--:|--:|--:|",
                *(
                    f"| {row['target']} | {row['chosen']} | {row['score']:.2f} | {row['best']} "
                    f"| {row['best_score']:.2f} | {row['none']:.2f} | {row['ptbn']:.2f} |"
                    for row in chosen
                ),
            ]
        ),
        *_differences(record["selected"]),
        *_costs([line for line in product if line["prediction"] == "after"]),
        "Costs are those of the prediction after the step; the one before it needs one forward "
        "less, that over views five more.",
    ]


def _fourth_figure(record: Mapping[str, Any]) -> list[str]:
    sources = record["setting"]["centres"]
    columns: list[Column] = [
        (source, lambda line, source=source: f"{line['empirical_by_source'][source]:+.3f}")  # type: ignore[misc]
        for source in sources
    ]
    average: Column = (
        "average [95% interval]",
        lambda line: with_ends(
            mean(line["empirical_by_source"].values()), line["empirical_interval"], 3, "+"
        ),
    )
    above: Column = ("above 0, %", lambda line: f"{100 * line['empirical_positive']:.0f}")
    gain: Column = (
        "minus that at θ, paired",
        lambda line: (
            with_ends(line["empirical_gain"], line["empirical_gain_interval"], 3, "+")
            if "empirical_gain" in line
            else "-"
        ),
    )
    return [
        table(record["lines"], [*columns, average, gain, above]),
        "Cosine of the gradient that is applied and the gradient of the cross-entropy with the "
        "labels at the weights before the step, over scales and shifts, mean over images. The "
        "labels serve this measurement alone. Intervals are bootstraps over images, within "
        "targets.",
        "![cosines by source](tta-figure4.png)",
    ]


def _scores(record: Mapping[str, Any]) -> list[Column]:
    columns: list[Column] = [
        (source, lambda line, source=source: f"{line['sources'][source]:.2f}")  # type: ignore[misc]
        for source in record["setting"]["centres"]
    ]
    columns.append(
        (
            "average [95% interval]",
            lambda line: with_ends(line["mean"], line["interval"]),
        )
    )
    if record["seeds"] > 1:
        columns.append(("by seed", lambda line: ", ".join(f"{v:.2f}" for v in line["seeds"])))
    return columns


def _paper() -> list[Column]:
    def show(place: int) -> Callable[[Line], str]:
        def cell(line: Line) -> str:
            figures = figures_of(line["variant"])
            return "-" if figures is None else f"{figures[place]:.2f}"

        return cell

    return [(f"paper's {name}", show(place)) for place, name in enumerate(DOMAINS)]


def _against(name: str, title: str) -> list[Column]:
    def signs(line: Line) -> str:
        found = line["against"][name]
        if found["better"] + found["worse"] == 0:
            return "-"
        return f"{found['better']} : {found['worse']}, p {_probability(found['p'])}"

    return [
        (f"minus {title} [95% interval]", lambda line: _difference(line, name)),
        ("better : worse", signs),
    ]


def _difference(line: Line, name: str) -> str:
    found = line["against"][name]
    return with_ends(found["difference"], found["interval"], sign="+")


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _worst(line: Line) -> str:
    worst = line["worst"]
    return f"{worst['difference']:+.2f}, {worst['source']} → {worst['target']}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _matrix(names: Sequence[str], cell: Callable[[str, str], str]) -> str:
    return "\n".join(
        [
            f"| pseudo | {' | '.join(names)} |",
            "|---|" + "--:|" * len(names),
            *(f"| {row} | {' | '.join(cell(row, column) for column in names)} |" for row in names),
        ]
    )


def table(lines: Sequence[Line], columns: Sequence[Column]) -> str:
    """A row for each line: its title, and what each column shows of it."""
    return table_of(lines, columns, "title", "method")


def _failed(record: Mapping[str, Any]) -> str:
    lines = [f"- {text}" for text in record["failures"]]
    return "\n".join(["Failed, and so without a row:", "", *lines]) if lines else ""
