"""The benchmarks' commands keep earlier results, and the docs print those of the tables."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from children import ROOT

from benchmarks import fundus
from benchmarks.__main__ import COMMANDS, main
from benchmarks.alignment import command as alignment
from benchmarks.alignment import digits, fronts, toy
from benchmarks.speed import command as speed
from benchmarks.tta.report import report as report_of_adaptation
from examples.common.command_line import parse
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, save_source_model

PROBLEMS = ("toy", "fonseca", "zdt", "digits", "fundus")
DEFAULTS = {"toy": toy.STEPS, "fonseca": fronts.STEPS, "zdt": fronts.STEPS, "digits": digits.STEPS}


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("problem", PROBLEMS)
def test_docs_print_the_commands_that_made_the_tables(problem: str) -> None:
    record = json.loads((ROOT / f"benchmarks/results/alignment-{problem}.json").read_text())
    made_by = record["command"]
    for page in ("docs/alignment.md", f"benchmarks/results/alignment-{problem}.md"):
        assert made_by in (ROOT / page).read_text().replace("`", "\n").split("\n"), page
    words = shlex.split(made_by.removeprefix("python -m benchmarks "))
    command = parse(COMMANDS, words, "python -m benchmarks", "")
    assert command.command_line() == made_by
    settings = record["settings"]
    assert (command.steps or DEFAULTS[problem]) == settings["steps"]
    if problem in ("fonseca", "zdt"):
        assert (command.seeds or fronts.STARTS) == settings["seeds"]
        assert {row["starts"] for row in record["rows"]} == {settings["seeds"]}


TTA_RESULTS = sorted((ROOT / "benchmarks/results").glob("tta-*.json"))


@pytest.mark.parametrize("path", TTA_RESULTS, ids=lambda path: path.stem)
def test_tables_of_adaptation_are_those_of_their_records(path: Path) -> None:
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == report_of_adaptation(record)
    words = shlex.split(record["command"].removeprefix("python -m benchmarks "))
    made_by = parse(COMMANDS, words, "python -m benchmarks", "")
    assert made_by.command_line() == record["command"]
    page = (ROOT / "docs/tta-results.md").read_text()
    assert record["command"] in page
    for line in record["lines"]:
        if "mean" in line and record["table"] in "1234":
            assert f"| {line['title']} | {line['mean']:.2f}" in page


def test_results_of_a_comparison_are_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "run_toy", lambda names, lr, steps, workers: ([], {}))
    monkeypatch.setattr(alignment, "plot_toy", lambda *arguments: None)
    monkeypatch.setattr(alignment, "report", lambda record: "")
    words = ["alignment", "--problem", "toy", "--out", str(tmp_path)]
    (tmp_path / "toy.json").write_text("earlier")
    assert f"{tmp_path / 'toy.json'} is there from an earlier run" in complaint(capsys, *words)
    assert (tmp_path / "toy.json").read_text() == "earlier"
    assert main([*words, "--overwrite"]) == 0
    record = json.loads((tmp_path / "toy.json").read_text())
    assert record["command"] == "python -m benchmarks alignment --problem toy"


def test_measured_times_are_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "speed.json").write_text("earlier")
    words = ["speed", "--parts", "overhead", "--networks", "transformer"]
    words += ["--transformer-width", "8", "--transformer-layers", "1", "--out", str(tmp_path)]
    assert "replace it with --overwrite" in complaint(capsys, *words)
    assert (tmp_path / "speed.json").read_text() == "earlier"
    assert "overwrite" not in speed.Speed(overwrite=True).command_line()


class TestFundus:
    """Sources run one by one into a folder."""

    @pytest.fixture
    def words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        weights = ResUNet34(2).state_dict()
        for source in ("centre_a", "centre_b"):
            path = tmp_path / f"{source}.pt"
            save_source_model(path, Architecture(2, 64, source), weights)
        rows: list[dict[str, Any]] = []
        monkeypatch.setattr(fundus.Fundus, "_adapt", lambda *arguments: rows)
        monkeypatch.setattr(fundus, "make_table", lambda files: " ".join(f.name for f in files))
        words = ["fundus", "--data-root", "synthetic", "--models", str(tmp_path), "--size", "64"]
        return [*words, "--width", "2", "--out", str(tmp_path / "out")]

    def test_they_add_up(self, words: list[str], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.json").write_text("mine")
        assert main([*words, "--sources", "centre_b"]) == 0
        assert main([*words, "--sources", "centre_a"]) == 0
        assert (tmp_path / "out" / "fundus.md").read_text() == "centre_a.json centre_b.json"

    def test_none_is_replaced_unasked(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        file = tmp_path / "out" / "centre_a.json"
        file.write_text("earlier")
        assert f"{file} is there" in complaint(capsys, *words, "--sources", "centre_a")
        assert file.read_text() == "earlier"
        assert main([*words, "--sources", "centre_a", "--overwrite"]) == 0
        assert json.loads(file.read_text())["width"] == 2

    def test_an_interrupted_run_is_told_how_to_go_on(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "centre_a.json").write_text("earlier")
        line = complaint(capsys, *words, "--sources", "centre_a,centre_b")
        assert "go on with the others by --sources centre_b, choose" in line

    @pytest.mark.parametrize("name", ["fundus", "composition"])
    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--images", "0", "--images is 0; choose at least 1"),
            ("--threads", "0", "--threads is 0"),
            ("--seed", "-1", "--seed is -1"),
            ("--size", "65", "--size is 65; choose a multiple"),
            ("--width", "3", "--width is 3; choose"),
        ],
    )
    def test_numbers_are_checked(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        name: str, option: str, value: str, message: str,
    ) -> None:  # fmt: skip
        line = complaint(capsys, name, *words[1:], "--sources", "centre_a", option, value)
        assert message in line
        assert not (tmp_path / "out").exists()

    def test_other_settings_are_not_mixed_in(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*words, "--sources", "centre_a"]) == 0
        capsys.readouterr()
        more = [*words, "--sources", "centre_b", "--overwrite"]
        for option, name in (("--images", "images None, not 3"), ("--seed", "seed 0, not 3")):
            assert f"centre_a.json was made with {name}" in complaint(capsys, *more, option, "3")
        assert not (tmp_path / "out" / "centre_b.json").exists()
