"""The table: means over seeds and cases, their intervals, and the paper's figures."""

import json
from pathlib import Path

import pytest

from examples.aneurysm.results import PAPER, PARTS, case_means, markdown_table, spread
from examples.common.bootstrap import bootstrap_interval
from examples.common.results import Result
from examples.common.scores import CaseScores


def result(method, seed, centre, values):
    """One case for each DSC; Jaccard and the rest follow from it."""
    cases = [
        CaseScores(
            f"{centre}/{k}",
            {"dsc": v, "sen": v + 1, "jac": v - 1, "vs": v + 2, "empty": 100.0 * (v == 0)},
        )
        for k, v in enumerate(values)
    ]
    return Result({"method": method, "centre": centre, "seed": seed}, cases)


RESULTS = [
    result("ema", 0, "a", [50.0, 60.0]),
    result("ema", 1, "a", [54.0, 64.0]),
    result("ema", 0, "b", [0.0]),
    result("ema", 1, "b", [20.0]),
    result("gsema", 0, "a", [60.0, 60.0]),
    result("gsema", 1, "a", [60.0, 60.0]),
    result("gsema", 0, "b", [40.0]),
    result("gsema", 1, "b", [40.0]),
]


def row(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_cases_are_averaged_over_seeds_first():
    assert case_means(RESULTS, "ema", "dsc") == {
        ("a", "a/0"): 52.0, ("a", "a/1"): 62.0, ("b", "b/0"): 10.0
    }  # fmt: skip
    low, high = bootstrap_interval([52.0, 62.0, 10.0], 0)
    mean = 124 / 3
    cells = row(markdown_table(RESULTS), "ema")
    assert cells[1] == f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    assert cells[3:7] == [f"{mean + 1:.2f}", f"{mean - 1:.2f}", f"{mean + 2:.2f}", "16.67"]
    assert cells[7:] == ["64.71", "62.86", "54.03", "72.64"]


def test_the_spread_is_that_of_means_over_seeds():
    """(50 + 60 + 0) / 3 and (54 + 64 + 20) / 3 are 9.33 apart."""
    assert float(spread(RESULTS, "ema")) == pytest.approx(9.333 / 2**0.5, abs=0.01)
    assert spread(RESULTS[:1], "ema") == "-"


def test_differences_are_paired_by_case():
    low, high = bootstrap_interval([8.0, -2.0, 30.0], 0)
    assert row(markdown_table(RESULTS), "gsema - ema")[1] == f"12.00 [{low:.2f}, {high:.2f}]"


def test_only_what_there_is_has_a_row():
    table = markdown_table(RESULTS)
    assert "Teachers" in table
    assert "Contrasts" not in table
    assert "nnunet" not in table
    assert "3 cases of a, b (each held out once) and 2 seed(s)" in table


def test_the_papers_figures_have_their_relations():
    """Jaccard is below Dice, and the paper's GS-EMA is its BACL-V."""
    assert PAPER["gsema"] == PAPER["bacl-v"]
    assert all(jaccard < dice for dice, _, jaccard, _ in PAPER.values())
    assert {name for names in PARTS.values() for name in names} == {*PAPER, "supervised"}


def test_the_documentation_prints_the_measured_scores():
    root = Path(__file__).parents[3]
    page = (root / "docs" / "aneurysm.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    printed = {row[0]: row[1:] for row in cells if len(row) == 10}
    measured: dict[str, dict[int, dict[str, float]]] = {}
    for run in json.loads((root / "benchmarks" / "results" / "aneurysm.json").read_text()):
        measured.setdefault(run["method"], {})[run["seed"]] = run
        for score in ("dsc", "sen", "jac", "vs"):
            of_cases = [case[score] for case in run["cases"]]
            assert run[score] == pytest.approx(sum(of_cases) / len(of_cases))
    assert {"supervised", "none", "ema", "gsema", "bacl"} <= measured.keys()
    for method, runs in measured.items():
        seeds = [f"{runs[seed]['dsc']:.2f}" if seed in runs else "-" for seed in range(3)]
        means = [
            f"{sum(run[score] for run in runs.values()) / len(runs):.2f}"
            for score in ("dsc", "sen", "jac", "vs", "empty")
        ]
        paper = f"{PAPER[method][0]:.2f}" if method in PAPER else "-"
        assert printed[method] == [*seeds, *means, paper]
