"""The comparison of sharpness-aware methods: its problems, its arithmetic and its command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from children import ROOT
from matplotlib.figure import Figure

import gradkit as gk
from benchmarks.__main__ import COMMANDS, main
from benchmarks.sharpness import command, digits, landscape, methods
from benchmarks.sharpness.plot import plot_digits
from benchmarks.sharpness.report import report
from benchmarks.sharpness.summary import steps_of_as_many_gradients, summarise
from benchmarks.speed import sharpness as speed
from benchmarks.speed.comparison import FLOOR
from benchmarks.speed.goals import GOALS
from benchmarks.speed.problem import resunet
from benchmarks.speed.timing import Clock, Rounds
from benchmarks.tables import Row
from examples.common.command_line import parse

CPU = torch.device("cpu")


def test_the_landscape_has_a_sharp_and_a_flat_minimum() -> None:
    for centre, curvature in ((landscape.SHARP, 20.0), (landscape.FLAT, 0.5)):
        plane = torch.nn.ParameterList([torch.tensor(centre, dtype=torch.float64)])
        found = gk.sharpness.report(
            lambda plane=plane: landscape.loss(plane[0]), plane, eigenvalues=2
        )
        assert found.gradient_norm < 0.15  # the other bowl moves the minimum a little
        assert found.eigenvalues == pytest.approx([curvature] * 2, rel=0.05, abs=0.3)
    away = [(1.0 + 2) ** 2 + 0.5**2, (1.0 - 2) ** 2 + 0.5**2]
    by_hand = -math.log(math.exp(-10 * away[0]) + math.exp(-away[1] / 4))
    assert float(landscape.loss(torch.tensor([1.0, 0.5]))) == pytest.approx(by_hand, rel=1e-5)


def test_descents_on_the_landscape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain descent stays in the sharp well, MSAM leaves it, and the noise is the same for both."""
    monkeypatch.setattr(landscape, "STARTS", landscape.STARTS[:2])
    rows, paths = landscape.run_landscape([methods.REFERENCE, "MSAM"], 60, workers=1)
    assert [(row["flat"], row["starts"], row["error"]) for row in rows] == [
        (0, 2, None),
        (2, 2, None),
    ]
    assert {len(path) for path in paths["MSAM"]} == {61}
    again, _ = landscape.run_landscape(["MSAM"], 60, workers=1)
    assert again == rows[1:]


def test_digits_are_divided_and_some_labels_are_wrong() -> None:
    parts = [digits.examples(part) for part in ("train", "validation", "test")]
    assert [len(part.classes) for part in parts] == [600, 400, 797]
    rows = torch.cat([part.images for part in parts])
    assert len(rows.unique(dim=0)) == len(rows)  # no image is there twice
    right = parts[0].classes
    for seed in range(3):
        wrong = digits.with_wrong_labels(right, torch.Generator().manual_seed(seed))
        assert int((wrong != right).sum()) == 240
        assert int(wrong.min()) >= 0
        assert int(wrong.max()) <= 9


def test_methods_get_what_they_ask_for() -> None:
    (made,) = methods.build("BSAM", steps=7, examples=300, seed=3, rho=0.02)
    assert isinstance(made, gk.BSAM)
    assert (made.num_data, made.rho) == (300, 0.02)
    assert made.generator is not None
    assert made.generator.initial_seed() == 3
    (made,) = methods.build("AESAM", steps=7, examples=300, seed=3)
    assert isinstance(made, gk.AESAM)
    assert (made.total_steps, made.rho) == (7, methods.METHODS["AESAM"].radius)
    assert methods.build(methods.REFERENCE, steps=7, examples=300, seed=3) == ()
    assert methods.METHODS["SlowWeights"].radius is None


def test_what_chooses_samples_gets_their_losses_and_pays_for_the_chosen_ones() -> None:
    for name, cost in (("ESAM", 1.5), ("Every", 1.2)):
        job = digits.Job(name, 2, lr=0.05, weight_decay=0.0, steps=5, rho=0.1, measured=False)
        found = digits.train(job)
        assert found["error"] is None
        assert found["gradients"] == pytest.approx(cost)
    rows, _ = landscape.run_landscape(["ESAM", "Every"], 3, workers=1)
    assert [row["error"] for row in rows] == [None, None]
    (made,) = methods.build("Every", steps=5, examples=1, seed=0, rho=0.3)
    assert repr(made) == "Every(5, SAM(rho=0.3))"


def test_a_training_is_the_same_again_and_counts_gradients() -> None:
    job = digits.Job("LookSAM", 2, lr=0.05, weight_decay=0.0, steps=20, rho=0.1)
    first, second = digits.train(job), digits.train(job)
    assert first == second
    assert first["gradients"] == pytest.approx(1.1)
    assert first["error"] is None
    assert first["eigenvalue"] > 0
    lost = digits.train(digits.Job("SGD", 2, lr=1e6, weight_decay=0.0, steps=20))
    assert "finite" in lost["error"]


def fake(job: digits.Job) -> dict[str, Any]:
    """A training whose accuracy is known: best at radius 0.1 and learning rate 0.05."""
    rho = methods.METHODS[job.method].radius if job.method != "SGD" else 0.0
    rho = rho if job.rho is None else job.rho
    score = 80.0 + job.seed % 7 - 100 * abs((rho or 0.0) - 0.1) - 10 * abs(job.lr - 0.05)
    score += 4 * (job.steps > 10)
    gradients = {"SGD": 1.0, "SAM": 2.0, "ASAM": 2.0, "MSAM": 1.0}[job.method]
    return {
        "method": job.method, "seed": job.seed, "rho": job.rho, "lr": job.lr, "steps": job.steps,
        "accuracy": score, "fit": 50.0, "gradients": gradients, "loss": 1.0,
        "sharpness": 0.1, "eigenvalue": 5.0, "trace": 9.0, "error": None,
    }  # fmt: skip


def test_what_is_chosen_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "train", fake)
    found = digits.compare(["SAM", "ASAM", "MSAM"], 3, 2, 10, 1, tmp_path / "trainings.jsonl")
    assert found["setting"]["lr"] == 0.05
    rows = found["rows"]
    kinds = [(row["method"], row["variant"], row["rho"], row["steps"]) for row in rows]
    # MSAM's best is half of its default, SAM's twice; ASAM's grid begins at 0.25.
    assert sorted(set(kinds), key=str) == [
        ("ASAM", "chosen", 0.25, 10),
        ("ASAM", "default", None, 10),
        ("MSAM", "chosen", 0.15, 10),
        ("MSAM", "default", None, 10),
        ("SAM", "chosen", 0.1, 10),
        ("SAM", "default", None, 10),
        ("SGD", "default", None, 10),
        ("SGD", "longer", None, 20),
    ]
    assert all(kinds.count(kind) == 3 for kind in kinds)
    summary = {(line["method"], line["variant"]): line for line in summarise(rows, 10)}
    best = summary["SAM", "chosen"]
    assert best["accuracy"]["mean"] == pytest.approx(81)
    assert best["difference"]["mean"] == pytest.approx(10)  # SGD has radius 0: 10 less
    assert best["at equal gradients"]["mean"] == pytest.approx(6)
    assert summary["SAM", "default"]["difference"]["low"] == pytest.approx(5)
    # A method with one gradient a step is compared with SGD of as many steps.
    assert (
        summary["MSAM", "chosen"]["at equal gradients"] == summary["MSAM", "chosen"]["difference"]
    )
    assert "difference" not in summary["SGD", "default"]
    # The auxiliary gradient of SAMPa's first step costs no comparison of its own.
    assert [steps_of_as_many_gradients(250, each) for each in (2.004, 1.1, 1.48)] == [500, 275, 375]


def test_an_interval_that_contains_zero_is_no_difference() -> None:
    def rows(name: str, variant: str, *scores: float, rho: float | None = None) -> list[Any]:
        common = {"lr": 0.1, "steps": 10, "rho": rho, "fit": 1.0, "gradients": 1.0, "loss": 1.0}
        common |= {"sharpness": 1.0, "eigenvalue": 1.0, "trace": 1.0}
        return [
            {"method": name, "variant": variant, "seed": n, "accuracy": s, **common, "error": None}
            for n, s in enumerate(scores)
        ]

    trained = [
        *rows("SGD", "default", 80, 81, 82),
        *rows("SAM", "default", 81, 80, 83),
        *rows("SAM", "chosen", 85, 86.1, 87, rho=0.1),
        *rows("MSAM", "default", 80, 81, 82),
    ]
    trained[-1]["error"] = "RuntimeError: it diverged"
    record = {
        "command": "python -m benchmarks sharpness", "machine": {}, "landscape": [],
        "setting": {"lr": 0.1, "weight_decay": 0.0}, "settings": {"steps": 10, "tuning_seeds": 1},
        "test digits": 797, "summary": summarise(trained, 10), "times": {"SGD": 1.0, "SAM": 1.93},
    }  # fmt: skip
    text = report(record)
    assert "| SAM | 0.05 | 81.33 ± 3.79 | no difference (+0.33 ± 2.87) |" in text
    assert "| SAM | 0.1 | 86.03 ± 2.49 | **+5.03 ± 0.14** | **+5.03 ± 0.14** |" in text
    assert "- MSAM: RuntimeError: it diverged" in text
    assert "| MSAM |" not in text


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits, "LRS", (0.05,))
    monkeypatch.setattr(digits, "WEIGHT_DECAYS", (0.0,))
    monkeypatch.setattr(digits, "PLAIN_LRS", (0.2,))
    monkeypatch.setattr(digits, "FACTORS", (1.0, 2.0))
    words = ["sharpness", "--methods", "SAM,BSAM,SlowWeights", "--steps", "3", "--seeds", "2"]
    words += ["--tuning-seeds", "1", "--landscape-steps", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    record = json.loads((tmp_path / "sharpness.json").read_text())
    text = (tmp_path / "sharpness.md").read_text()
    assert text in capsys.readouterr().out
    assert {row["method"] for row in record["rows"]} == {"SGD", "SAM", "BSAM", "SlowWeights"}
    assert all(row["error"] is None for row in record["rows"])
    assert {row["lr"] for row in record["rows"]} == {0.05, 0.2}
    assert {row["steps"] for row in record["rows"] if row["variant"] == "longer"} == {6}
    assert len(record["landscape"]) == 4
    assert record["times"].keys() == {"SGD", "SAM", "BSAM", "SlowWeights"}
    assert record["times"]["SGD"] == 1
    assert record["times"]["SAM"] > 1.2  # two gradients
    for picture in ("sharpness-landscape.png", "sharpness-digits.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    assert main(["sharpness", "--seeds", "1", "--out", str(tmp_path / "other")]) == 2
    assert "--seeds is 1; choose at least 2" in capsys.readouterr().err
    assert main(["sharpness", "--methods", "SAM,SUM", "--out", str(tmp_path / "other")]) == 2
    assert "unknown name 'SUM'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More methods join trainings that are there, which are not trained again."""
    trained: list[digits.Job] = []

    def counted(job: digits.Job) -> dict[str, Any]:
        if len(trained) == 9 and "torn" not in seen:
            raise KeyboardInterrupt
        trained.append(job)
        return fake(job)

    seen: list[str] = []
    monkeypatch.setattr(digits, "train", counted)
    monkeypatch.setattr(digits, "TIMED", 1)
    for name in ("plot_digits", "plot_landscape"):
        monkeypatch.setattr(command, name, lambda *arguments: None)

    def run(names: str, *more: str) -> int:
        words = ["sharpness", "--methods", names, "--seeds", "2", "--tuning-seeds", "1"]
        words += ["--steps", "3", "--landscape-steps", "0", "--out", str(tmp_path), *more]
        return main(words)

    assert run("SAM") == 130
    kept = tmp_path / "trainings.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) == len(trained) == 9
    kept.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # as if the machine had stopped
    seen.append("torn")
    torn = trained.pop()
    assert run("SAM") == 0
    assert trained[8] == torn
    assert len(trained) == len(set(trained))
    before, first = len(trained), json.loads((tmp_path / "sharpness.json").read_text())
    assert run("SAM,MSAM") == 0
    assert {job.method for job in trained[before:]} == {"MSAM"}
    both = json.loads((tmp_path / "sharpness.json").read_text())
    assert [row for row in both["rows"] if row["method"] != "MSAM"] == first["rows"]
    assert {row["method"] for row in both["rows"]} == {"SGD", "SAM", "MSAM"}
    before = len(trained)
    assert run("SAM", "--overwrite") == 0
    assert {job.method for job in trained[before:]} == {"SGD", "SAM"}


def test_docs_print_the_command_that_made_the_table() -> None:
    record = json.loads((ROOT / "benchmarks/results/sharpness.json").read_text())
    made_by = record["command"]
    for page in ("docs/sharpness-results.md", "benchmarks/results/sharpness.md"):
        assert made_by in (ROOT / page).read_text().replace("`", "\n").split("\n"), page
    parsed = parse(COMMANDS, made_by.split()[3:], "python -m benchmarks", "")
    assert parsed.command_line() == made_by
    assert parsed.steps == record["settings"]["steps"]
    assert report(record) == (ROOT / "benchmarks/results/sharpness.md").read_text()


def test_what_sharpness_aware_steps_are_timed_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forward passes in the floor as in gradkit's steps."""
    problem = resunet("4x32", 2, CPU)
    forward, counts = type(problem.model()).forward, [0]

    def counted(self: Any, *arguments: Any) -> Any:
        counts[0] += 1
        return forward(self, *arguments)

    monkeypatch.setattr(type(problem.model()), "forward", counted)
    for names in speed.groups(most_passes=4):
        special = [name for name in names[3:] if name in ("AESAM", "ESAM", "Every")]
        comparison = speed.compare(problem, names[:3] + special)
        seen = {}
        for name, make in {FLOOR: comparison.floor, **comparison.ours}.items():
            step = make()
            step()
            counts[0] = 0
            step()
            seen[name] = counts[0]
        # One second gradient in a cycle of five steps; one forward pass without a graph.
        more = {"LookSAM": 1, "Every": 1, "ESAM": 1}
        assert all(count == seen[FLOOR] + more.get(name, 0) for name, count in seen.items()), seen
    assert {name for group in speed.groups(2) for name in group} == {
        name for name, _, _ in speed.limits()
    }
    assert {goal.method for goal in GOALS if goal.measure == speed.TO_PASSES} == {
        name for name, _, _ in speed.limits()
    }


def test_rows_of_sharpness_aware_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "METHODS", {k: speed.METHODS[k] for k in ("SAM", "GSAM", "MSAM")})
    rows: list[Row] = list(
        speed.measure_sharpness(
            resunet("2x32", 2, CPU), Clock(CPU), Rounds(1, 1, 0.0), 0, most_passes=2
        )
    )
    found = [(row["method"], row["variant"].partition(" ")[0]) for row in rows]
    assert sorted(found) == [
        ("GSAM", "gradkit,"),
        ("GSAM", "pytorch-optimizer"),
        ("MSAM", "gradkit,"),
        ("SAM", "gradkit,"),
        ("SAM", "pytorch-optimizer"),
    ]
    lines = speed.sharpness_table(rows).split("\n")
    assert len(lines) == 5
    assert lines[2].count("[") == 2  # SAM beside its peer
    assert lines[4].count("[") == 1


@pytest.mark.parametrize(("far", "scale"), [(0.1, "log"), (1.2, "linear")])
def test_the_legend_is_there_though_the_first_method_fails(
    far: float, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    lines = [
        {"method": name, "eigenvalue": value, "difference": {"mean": mean, "low": -99, "high": 9}}
        for name, value, mean in (("SGD", 1.0, 0), ("SAM", far, -20), ("ASAM", 1.1, 1))
    ]
    plot_digits(lines, lines, {"SAM": 2.0, "ASAM": 2.0}, tmp_path / "x.png")
    (figure,) = figures
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["default rho", "chosen rho"]
    assert figure.axes[1].get_xscale() == scale
