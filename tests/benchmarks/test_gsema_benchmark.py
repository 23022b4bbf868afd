"""The benchmark of GS-EMA's rules: its rows, its report, and what the documentation prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from children import ROOT

from benchmarks.__main__ import COMMANDS, main
from benchmarks.gsema import RULES, report
from examples.common.command_line import parse

SMALL = ("gsema", "--seeds", "2", "--steps", "3")


def test_rules_without_a_contrast_share_their_students(tmp_path: Path) -> None:
    assert main([*SMALL, "--apart", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gsema.json").read_text())
    rows = record["rows"]
    assert [(row["rule"], row["seed"]) for row in rows] == [
        (rule, seed) for seed in range(2) for rule in RULES
    ]
    for key in ("student, unseen", "student, source"):
        assert all(len({row[key] for row in rows if row["seed"] == seed}) == 1 for seed in (0, 1))
    for seed in (0, 1):
        gates = {row["rule"]: row["aligned"] for row in rows if row["seed"] == seed}
        assert gates["EMA 0.9"] is None
        assert gates["code"] + gates["code, inverted"] == pytest.approx(100)
        assert gates["text, 0.9"] + gates["Algorithm 1, 0.9"] == pytest.approx(100)
    text = (tmp_path / "gsema.md").read_text()
    assert text == report(record)
    assert f"`{record['command']}`" in text
    assert "no EMA (the student)" in text
    assert main([*SMALL, "--out", str(tmp_path)]) == 2


def test_with_a_contrast_a_teacher_changes_its_student(tmp_path: Path) -> None:
    """The teachers' rules differ after two steps only, and their students after three."""
    assert main([*SMALL, "--contrast", "50", "--name", "c", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "c.json").read_text())
    students = {(row["student, unseen"], row["student, source"]) for row in record["rows"]}
    assert len(students) > 2
    assert "no EMA" not in (tmp_path / "c.md").read_text()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seeds", "1", "an interval needs"),
        ("lr", "nan", "positive"),
        ("contrast", "-1", "at least"),
        ("name", "a/b", "--name is 'a/b'; give a file name"),
        ("name", "", "--name is ''; give a file name"),
    ],
)
def test_arguments(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gsema", f"--{option}={value}", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gsema", "gsema-apart"])
def test_the_documentation_prints_the_commands_that_made_the_tables(name: str) -> None:
    results = ROOT / "benchmarks" / "results"
    record = json.loads((results / f"{name}.json").read_text())
    assert (results / f"{name}.md").read_text() == report(record)
    command = record["command"]
    page = (ROOT / "docs" / "gs-ema.md").read_text()
    assert command in page
    words = shlex.split(command.removeprefix("python -m benchmarks "))
    made = parse(COMMANDS, words, "python -m benchmarks", "")
    assert made.command_line() == command
    table = [line for line in report(record).splitlines() if line.startswith("|")]
    assert all(line in page for line in table)
