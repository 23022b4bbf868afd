"""Results: their files, and the paper's Table 1 with its own figures beside them."""

from collections.abc import Sequence

from examples.aneurysm.inference import EMPTY
from examples.common.bootstrap import bootstrap_interval
from examples.common.metrics import OVERLAPS, mean
from examples.common.results import Result

RESULT_FILES = ("results.json", "table.md", "projections.png", "latents.png", "gate.png")
"""All that commands write about one run, straight into the folder of their results."""

PAPER = {
    "nnunet": (59.61, 57.51, 47.38, 70.91),
    "vaseg": (60.28, 54.47, 49.82, 67.91),
    "feddg": (64.50, 64.31, 54.26, 74.73),
    "cmdg": (65.01, 64.10, 54.11, 73.38),
    "none": (61.52, 55.64, 50.91, 69.01),
    "ema": (64.71, 62.86, 54.03, 72.64),
    "gsema": (68.49, 72.79, 58.40, 76.63),
    "bacl-v": (68.49, 72.79, 58.40, 76.63),
    "bacl-b": (70.62, 75.14, 60.54, 78.22),
    "bacl": (71.89, 70.88, 62.36, 80.00),
}
"""DSC, Sen, Jac and VS (%) of the paper's Table 1, on @neurIST's 223 patients of four centres."""

PARTS = {
    "Methods": ("supervised", "nnunet", "vaseg", "feddg", "cmdg", "bacl"),
    "Teachers": ("none", "ema", "gsema"),
    "Contrasts": ("bacl-v", "bacl-b", "bacl"),
}
"""The three parts of the table."""

PAIRS = (
    ("ema", "none"), ("gsema", "ema"), ("bacl-v", "gsema"), ("bacl-b", "gsema"),
    ("bacl", "gsema"), ("bacl", "cmdg"), ("bacl", "nnunet"),
)  # fmt: skip
"""Methods whose difference is told, the second taken from the first."""

Case = tuple[str, str]  # centre, name


def case_means(results: Sequence[Result], method: str, score: str) -> dict[Case, float]:
    """A score of a method by case, the mean over seeds."""
    values: dict[Case, list[float]] = {}
    for result in results:
        if result.labels["method"] == method:
            for case in result.cases:
                key = (str(result.labels["centre"]), case.case)
                values.setdefault(key, []).append(case.scores[score])
    return {key: mean(each) for key, each in values.items()}


def spread(results: Sequence[Result], method: str) -> str:
    """The standard deviation over seeds of the mean DSC over all cases; "-" for one seed."""
    seeds: dict[object, list[float]] = {}
    for result in results:
        if result.labels["method"] == method:
            seeds.setdefault(result.labels["seed"], []).extend(result.values("dsc"))
    means = [mean(values) for values in seeds.values()]
    if len(means) < 2:
        return "-"
    variance = sum((value - mean(means)) ** 2 for value in means) / (len(means) - 1)
    return f"{variance**0.5:.2f}"


def markdown_table(results: Sequence[Result], seed: int = 0) -> str:
    """The paper's Table 1 of the methods that there are, in Markdown.

    Args:
        results: One for each method, held-out centre and seed.
        seed: Of the bootstrap.
    """
    methods = list(dict.fromkeys(str(result.labels["method"]) for result in results))
    seeds = {result.labels["seed"] for result in results}
    centres = dict.fromkeys(str(result.labels["centre"]) for result in results)
    lines = []
    for title, names in PARTS.items():
        there = [name for name in names if name in methods]
        if not there:
            continue
        lines += [
            f"| {title} | DSC [95% interval] | sd | Sen | Jac | VS | empty | "
            "paper: DSC | Sen | Jac | VS |",
            f"|---|{10 * '--:|'}",
            *(_row(results, name, seed) for name in there),
            "",
        ]
    differences = _differences(results, methods, seed)
    if differences:
        lines += ["| Difference in DSC | mean [95% interval] |", "|---|--:|", *differences, ""]
    cases = len(case_means(results, methods[0], "dsc"))
    lines.append(
        f"Scores of the aneurysm in %, means over {cases} cases of {', '.join(centres)} (each held "
        f"out once) and {len(seeds)} seed(s). The interval is a percentile bootstrap over cases, "
        "each a mean over seeds, and does not cover how trainings vary; sd is the standard "
        "deviation of the mean over seeds. Both empty scores 100, one of them empty 0: `empty` is "
        "the share of cases where prediction or target is empty. The paper's figures are of other "
        "data (@neurIST, 223 patients) and a larger network: only orders can be compared."
    )
    return "\n".join(lines) + "\n"


def _row(results: Sequence[Result], method: str, seed: int) -> str:
    means = {name: list(case_means(results, method, name).values()) for name in (*OVERLAPS, EMPTY)}
    paper = [f"{value:.2f}" for value in PAPER.get(method, ())] or 4 * ["-"]
    cells = [
        method,
        _with_interval(means["dsc"], seed),
        spread(results, method),
        *(f"{mean(means[name]):.2f}" for name in (*OVERLAPS[1:], EMPTY)),
        *paper,
    ]
    return f"| {' | '.join(cells)} |"


def _differences(results: Sequence[Result], methods: Sequence[str], seed: int) -> list[str]:
    lines = []
    for first, second in PAIRS:
        if first in methods and second in methods:
            one, other = (case_means(results, name, "dsc") for name in (first, second))
            gaps = [one[case] - other[case] for case in one]
            lines.append(f"| {first} - {second} | {_with_interval(gaps, seed)} |")
    return lines


def _with_interval(values: Sequence[float], seed: int) -> str:
    if len(values) < 2:
        return f"{mean(values):.2f} [-]"
    low, high = bootstrap_interval(values, seed)
    return f"{mean(values):.2f} [{low:.2f}, {high:.2f}]"
