"""Results and tables have the labels and scores that they are given."""

import json

import pytest

from examples.common.bootstrap import bootstrap_interval
from examples.common.results import (
    Result,
    Row,
    average_rows,
    markdown_table,
    remove_results,
    result_row,
    scored_row,
    write_json,
)
from examples.common.scores import CaseScores

VALUES = {"a": (80.0, 4.0), "b": (90.0, 2.0), "c": (70.0, 9.0)}  # gland Dice in %, distance in mm
CASES = [CaseScores(name, {"dice": dice, "hd95": far}) for name, (dice, far) in VALUES.items()]


def result(site, method="none", cases=CASES, **labels):
    return Result({"method": method, "site": site, "seed": 0, **labels}, cases)


def test_json_has_labels_means_and_every_case(tmp_path):
    write_json([result("RUNMC")], tmp_path / "results.json", ["hd95"], "volume")
    (content,) = json.loads((tmp_path / "results.json").read_text())
    assert list(content) == ["method", "site", "seed", "n", "hd95", "volumes"]
    assert content["n"] == 3
    assert content["hd95"] == 5.0
    assert content["volumes"][1] == {"volume": "b", "dice": 90.0, "hd95": 2.0}


def test_a_mean_over_scores_is_written_on_request_only():
    content = result("RUNMC").as_json(["dice", "mean"])
    assert content["mean"] == (80 + 5) / 2
    assert "mean" not in result("RUNMC").as_json(["dice"])


def test_intervals_are_of_the_scores_asked_for():
    row = result_row(result("RUNMC"), seed=4, intervals=["hd95", "mean"])
    assert row.intervals["hd95"] == bootstrap_interval([4.0, 2.0, 9.0], seed=4)
    assert row.intervals["mean"] == bootstrap_interval([42.0, 46.0, 39.5], seed=4)
    single = result_row(result("RUNMC", cases=CASES[:1]), seed=4)
    assert single.intervals == {"mean": None}


def test_averages_count_results_alike_whatever_their_cases():
    results = [
        result("RUNMC"),
        result("BMC", cases=CASES[1:2]),
        result("RUNMC", "dim"),
        result("BMC", "dim"),
    ]
    first, second = average_rows(results, over="site", by="method")
    assert first.labels == {"method": "none", "site": "average over sites", "seed": 0}
    assert first.n is None
    assert first.scores == {"dice": 85.0, "hd95": 3.5, "mean": 44.25}
    assert second.scores["dice"] == 80.0
    assert average_rows(results[:1], over="site", by="method") == []


def test_table():
    rows = [
        result_row(result("RUNMC", lr=1e-4), seed=0, intervals=["dice"]),
        result_row(result("BMC", lr=None, cases=CASES[:1]), seed=0, intervals=["dice"]),
        scored_row({"site": "HK", "lr": 0.5}, 7, {"dice": 1.125, "hd95": 2.0}),
        Row({"site": "average", "lr": None}, None, {"dice": 12.345678, "hd95": 3.0}),
    ]
    low, high = bootstrap_interval([80.0, 90.0, 70.0], seed=0)
    assert markdown_table(["site", "lr"], ["dice", "hd95"], rows).splitlines() == [
        "| site | lr | n | dice [95% interval] | hd95 |",
        "|---|---|--:|--:|--:|",
        f"| RUNMC | 0.0001 | 3 | 80.00 [{low:.2f}, {high:.2f}] | 5.00 |",
        "| BMC | - | 1 | 80.00 [-] | 4.00 |",
        "| HK | 0.5 | 7 | 1.12 | 2.00 |",
        "| average | - | - | 12.35 | 3.00 |",
    ]


@pytest.mark.parametrize("there", [True, False])
def test_results_of_an_earlier_run_are_removed(tmp_path, there):
    names = ["results.json", "table.md"]
    (tmp_path / "notes.txt").write_text("mine")
    if there:
        (tmp_path / "table.md").write_text("earlier")
    assert remove_results(tmp_path, names) == there
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_cases_without_labels_have_no_part_in_means():
    unlabelled = CaseScores("d", {})
    mixed, whole = result("RUNMC", cases=[unlabelled, *CASES]), result("RUNMC")
    names = ["dice", "hd95", "mean"]
    content, expected = mixed.as_json(names), whole.as_json(names)
    assert content.pop("cases") == [{"case": "d"}, *expected.pop("cases")]
    assert content == expected
    assert result_row(mixed, 0) == result_row(whole, 0)
    assert average_rows([mixed, result("BMC")], "site", "method") == average_rows(
        [whole, result("BMC")], "site", "method"
    )


def test_a_result_without_a_score_has_a_row_of_dashes():
    none = result("RUNMC", cases=[CaseScores("d", {}), CaseScores("e", {})])
    content = none.as_json(["dice"])
    assert (content["n"], content["dice"]) == (0, None)
    *_, line = markdown_table(["site"], ["dice", "mean"], [result_row(none, 0)]).splitlines()
    assert line == "| RUNMC | 0 | - | - |"
