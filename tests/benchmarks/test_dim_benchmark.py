"""The benchmark of DiM's parts: its rows and report, and that it goes on where it was."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from children import ROOT

from benchmarks.__main__ import COMMANDS, main
from benchmarks.dim import METHODS, report
from examples.common import training
from examples.common.command_line import parse
from examples.semi.methods import DIVERGENCES, VARIANTS, parse_methods

SMALL = [
    "dim", "--size", "32", "--width", "2", "--iterations", "2", "--every", "1", "--batch-size", "2",
    "--labels", "6", "--train-images", "15", "--test-images", "2", "--sites", "site_a,site_b",
    "--methods", "supervised,dim:critic", "--no-cutmix", "--amp", "False",
]  # fmt: skip


def test_every_variant_has_a_row() -> None:
    methods = parse_methods(",".join(METHODS))
    words = {word for text in methods for word in text.split(":")[1:]}
    defaults = {"js", "prob", "total", "perturbed"}
    wanted = {word for choices in VARIANTS.values() for word in choices}
    assert words == wanted - defaults - {"gan"}
    assert "gan" in DIVERGENCES


def test_trainings_are_tested_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--seeds", "1", "--out", str(tmp_path)]) == 2
    assert "an interval needs at least 2" in capsys.readouterr().err
    trained: list[int] = []
    real = training.run_epoch

    def counted(*arguments: Any) -> Any:
        trained.append(1)
        return real(*arguments)

    monkeypatch.setattr(training, "run_epoch", counted)
    assert main([*SMALL, "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert len(trained) == 8  # two validations of two methods with two seeds
    record = json.loads((tmp_path / "dim.json").read_text())
    rows = record["rows"]
    assert [(row["method"], row["seed"], row["site"]) for row in rows] == [
        (method, seed, site)
        for method in ("supervised", "dim:critic")
        for seed in (0, 1)
        for site in ("site_a", "site_b")
    ]
    for row in rows:
        assert row["n"] == 2
        assert row["best"] in (1, 2)
        assert 0 <= row["dice"] <= 100
        assert 0 <= row["student"] <= 100
    text = (tmp_path / "dim.md").read_text()
    assert text == report(record)
    assert "reconstruction from DiM's abstract" in text
    command = record["command"]
    assert f"`{command}`" in text
    words = shlex.split(command.removeprefix("python -m benchmarks "))
    assert parse(COMMANDS, words, "python -m benchmarks", "").command_line() == command
    assert set(SMALL) <= {"dim", *words}
    assert main([*SMALL, "--seeds", "2", "--name", "again", "--out", str(tmp_path)]) == 0
    assert len(trained) == 8
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == rows


def test_the_report_pairs_seeds() -> None:
    """Two seeds whose differences are 1 and 3: the interval is 2 ± t(0.975, 1)·1."""
    dice = {"fixmatch": (50.0, 70.0), "dim": (51.0, 73.0)}
    rows = [
        {
            "method": method, "site": site, "seed": seed, "n": 4, "hd95": 3.0, "student": 40.0,
            "dice": value + shift, "jaccard": 0.0, "asd": 0.0, "best": 1,
        }
        for method, values in dice.items()
        for seed, value in enumerate(values)
        for site, shift in (("here", 6.0), ("there", -6.0))
    ]  # fmt: skip
    settings = {
        "task": "prostate", "labelled": "here", "synthetic": False, "labels": 7, "seeds": 2,
        "size": 32, "width": 2, "iterations": 5,
    }  # fmt: skip
    text = report({"command": "c", "machine": {"cores": "2"}, "settings": settings, "rows": rows})
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == (
        "| method | Dice | here | other sites | Dice minus fixmatch | Dice minus dim | HD95 | "
        "student's Dice |"
    )
    assert lines[1] == (
        "| fixmatch | 60.00 ± 127.06 | 66.00 | 54.00 | - | -2.00 ± 12.71 | 3.00 | 40.00 |"
    )
    assert lines[2] == (
        "| dim | 62.00 ± 139.77 | 68.00 | 56.00 | +2.00 ± 12.71 | - | 3.00 | 40.00 |"
    )
    assert "(real) of here (4), there (4)" in text
    assert "width 2, 5 iterations: far below the published settings." in text
    settings |= {"size": 384, "width": 64, "iterations": 60000}
    text = report({"command": "c", "machine": {}, "settings": settings, "rows": rows})
    assert "width 64, 60000 iterations." in text


def test_a_name_with_a_folder_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--seeds", "2", "--name", "a/b", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--name is 'a/b'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("dim*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_documentation_prints_the_command_that_made_the_table(path: Path) -> None:
    record = json.loads(path.read_text())
    text = report(record)
    assert path.with_suffix(".md").read_text() == text
    page = (ROOT / "docs" / "prostate.md").read_text()
    assert record["command"] in page
    words = shlex.split(record["command"].removeprefix("python -m benchmarks "))
    made = parse(COMMANDS, words, "python -m benchmarks", "")
    assert made.command_line() == record["command"]
    assert all(line in page for line in text.splitlines() if line.startswith("|"))
