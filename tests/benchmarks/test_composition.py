"""The fusion's benchmark: each variant is what the adapter of its name predicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import complaint_of

from benchmarks.__main__ import main
from benchmarks.composition.candidates import Predictor
from benchmarks.composition.gates import (
    Cues,
    cup_at,
    fit_intercept,
    fit_logistic,
    leave_one_target_out,
    mean_cup,
)
from benchmarks.composition.shifted import Shifted
from benchmarks.composition.student import STUDENTS, Student, score_students
from benchmarks.composition.table import gains, report
from benchmarks.composition.variants import GRID, VARIANTS, predict_all, score_all
from examples.common.datasets import Sample
from examples.common.metrics import dice
from examples.fundus.fusion import FIXED, describe
from examples.fundus.gate import CupGate, CupRatio
from examples.fundus.methods import build_adapter
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, save_source_model
from gradkit import tta

RATIO = CupRatio(0.3, 0.5)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Whose cups and discs are some of the image, and whose statistics do not fit."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, padding=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 2, 5, padding=2),
    )
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.05, 0.5)
    network[3].bias.data = torch.tensor([0.1, -0.1])
    return network.eval()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(4, 3, 40, 40, generator=generator)
    images = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)
    images = (images - images.amin()) / (images.amax() - images.amin())
    target = torch.zeros(2, 32, 32)
    target[0, 6:26, 6:26] = target[1, 10:20, 10:20] = 1
    return [Sample(str(n), image[:, 4:36, 4:36], target) for n, image in enumerate(images)]


def test_variants_predict_what_the_adapters_predict(
    model: torch.nn.Module, samples: list[Sample]
) -> None:
    predictor = Predictor(model)
    found = predict_all([predictor(sample.image) for sample in samples], RATIO, seed=0)
    u1 = {"statistics": (tta.Mixed(0.2),)}
    adapters = {
        "No Adapt": tta.NoAdapt(model),
        "No Adapt, views": tta.Fuse(model, statistics=("source",)),
        "PTBN": tta.PTBN(model),
        "0.8 test, views": tta.Fuse(model, **u1),
        "fused (fixed per class)": build_adapter("fused", model),
        "gated": build_adapter("gated", model, ratio=RATIO),
    }
    different = set()
    for name, adapter in adapters.items():
        for sample, p in zip(samples, found[name], strict=True):
            expected = torch.sigmoid(adapter(sample.image[None]))[0]
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)
        different.add(round(float(found[name][0][1].sum()), 3))
    assert len(different) == len(adapters)


def test_controls_keep_the_weights_but_not_their_images(
    model: torch.nn.Module, samples: list[Sample]
) -> None:
    predictor = Predictor(model)
    candidates = [predictor(sample.image) for sample in samples]
    found = predict_all(candidates, RATIO, seed=0)

    def weights(name: str) -> list[float]:
        """From the prediction, where both candidates differ most."""
        result = []
        for each, p in zip(candidates, found[name], strict=True):
            first, second = each.viewed[0, 1], each.viewed[1, 1]
            place = (second - first).abs().argmax()
            difference = (second - first).flatten()[place]
            result.append(float((p[1] - first).flatten()[place] / difference))
        return result

    gated = weights("gated")
    assert max(gated) - min(gated) > 0.05
    assert weights("control: gate reversed") == pytest.approx([1 - w for w in gated], abs=1e-3)
    other = weights("control: weights of other images")
    assert sorted(other) == pytest.approx(sorted(gated), abs=1e-3)
    assert other != pytest.approx(gated, abs=1e-3)


def test_scores_of_an_image(model: torch.nn.Module, samples: list[Sample]) -> None:
    predictor = Predictor(model)
    candidates = [predictor(sample.image) for sample in samples]
    rows = score_all(candidates, samples, RATIO, seed=0)
    for each, sample, row in zip(candidates, samples, rows, strict=True):
        assert set(row["scores"]) == set(VARIANTS)
        pairs = [dice(u >= 0.5, sample.target, 2).tolist() for u in each.viewed]
        best = [max(pair) for pair in zip(*pairs, strict=True)]
        assert row["scores"]["oracle by label (no method)"] == pytest.approx(best, abs=0.006)
        assert row["scores"]["No Adapt, views"] == pytest.approx(pairs[0], abs=0.006)
        assert row["cup_by_weight"][0] == pytest.approx(pairs[0][1], abs=0.006)
        assert row["cup_by_weight"][-1] == pytest.approx(pairs[1][1], abs=0.006)
        assert row["cup_by_weight"][GRID.index(0.4)] == pytest.approx(
            row["scores"]["fused (fixed per class)"][1], abs=0.006
        )


def test_the_size_of_the_shift() -> None:
    """Of one layer: |μ − μ_s|/σ_s + |log(σ/σ_s)|, and of the image alone."""
    layer = torch.nn.BatchNorm2d(2, eps=1e-12)
    layer.running_mean.copy_(torch.tensor([1.0, 0.0]))
    layer.running_var.copy_(torch.tensor([4.0, 1.0]))
    image = torch.tensor([[[0.0, 10.0], [10.0, 0.0]], [[1.0, -1.0], [1.0, -1.0]]])
    expected = (abs(5 - 1) / 2 + torch.log(torch.tensor(5 / 2)).item() + 0) / 2
    predictor = Predictor(layer)
    assert predictor(image).shift == pytest.approx(expected, rel=1e-5)
    assert predictor(3 * image).shift > expected + 1
    assert predictor(image).shift == pytest.approx(expected, rel=1e-5)


def records() -> list[dict[str, object]]:
    """Two pairs of two images, whose gains are known."""

    def image(disc: float, cup: float) -> dict[str, object]:
        scores = {name: [80.0 + disc, 60.0 + cup] for name in VARIANTS}
        cues = {"shift": 1.0, "rounder": 0.0, "farther": 0.0, "cup_by_weight": [60.0, 62.0 + cup]}
        return {**cues, "scores": {**scores, "No Adapt": [80.0, 60.0]}}

    def record(part: str, target: str, images: list[dict[str, object]]) -> dict[str, object]:
        made = {"made_with": {"seed": 0}, "machine": {"processor": "abacus"}}
        return {"part": part, "source": "s", "target": target, "images": images, **made}

    learnt = [{"scores": {name: [81.0, 61.0] for name in STUDENTS}}] * 2
    return [
        record("pairs", "a", [image(2, 4), image(0, -6)]),
        record("pairs", "b", [image(-1, -1), image(5, 5)]),
        record("distilled", "b", learnt),
    ]


def test_the_table_has_the_gains() -> None:
    found = records()
    assert gains(found[0], "gated") == [[2.0, 4.0], [0.0, -6.0]]
    lines = report(found).splitlines()
    line = next(line for line in lines if line.startswith("| gated |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:4] == ["12", "71.00"]
    assert cells[4].startswith("+1.00 [")  # of both pairs: 0 and 2
    assert cells[5:9] == ["+1.50", "+0.50", "+0.00 to +2.00", "25%"]
    assert "| s → a | 2 | 70.00 | +0.00 | +0.00 | +0.00 |" in lines
    (line,) = [line for line in lines if line.startswith("| distilled, gated |")]
    assert line.startswith("| distilled, gated | 26 + 2 back | 71.00 | +1.00 [+1.00, +1.00] |")


def test_the_rule_among_the_gates_is_the_rule() -> None:
    """Without cues w = sigmoid(0.25), by which the cup is a mixture of 60 and 62 + its gain."""
    (line,) = [line for line in report(records()).splitlines() if line.startswith("| the rule |")]
    w = torch.sigmoid(torch.tensor(0.25)).item()
    gains = [(1 + w * (2 - 1)) / 2, (2 + w * (2 + 2)) / 2]  # a pair's mean of disc and cup
    assert line.startswith(f"| the rule | {sum(gains) / 2:+.2f} | {min(gains):+.2f} |")


def made_up(count: int, seed: int) -> Cues:
    """The second candidate is better by 10 where 2·first feature − third·1 + noise > 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    x[:, 2] = 1
    noise = torch.rand(count, generator=generator, dtype=torch.float64)
    better = torch.special.logit(noise) < 2 * x[:, 0] - 1
    ends = torch.where(better, 10.0, 0.0).double()
    return Cues(x, torch.stack([10 - ends, torch.full_like(ends, 5), ends], dim=1))


def test_gates_find_what_decides() -> None:
    group = made_up(4000, 0)
    fitted = fit_logistic([group], with_shift=True)
    assert fitted.tolist() == pytest.approx([2, 0, -1, 0], abs=0.25)
    assert fit_logistic([group], with_shift=False)[3] == 0
    by_shift = Cues(group.features[:, [1, 1, 2, 0]], group.cup)  # what decides is the shift
    by_shift.features[:, 3] += 3  # far from 0, as logarithms may be
    fitted = fit_intercept([by_shift], with_shift=True)
    assert fitted[:2].tolist() == [1, 1]
    assert fitted[3] >= 2
    assert -fitted[2] / fitted[3] == pytest.approx(3.5, abs=0.2)  # where the better one changes
    assert mean_cup(by_shift, fitted) > mean_cup(by_shift, fit_intercept([by_shift], False)) + 0.5
    assert fit_intercept([group], with_shift=False)[3] == 0


def test_the_cup_between_two_weights() -> None:
    cup = torch.tensor([[10.0, 20.0, 0.0]]).double().expand(4, 3)
    w = torch.tensor([0.0, 0.25, 0.75, 1.0]).double()
    assert cup_at(cup, w).tolist() == [10, 15, 10, 0]


def test_a_gate_is_not_fitted_on_its_own_target() -> None:
    pairs = {
        (s, t): made_up(30, 3 * i + j) for i, s in enumerate("abc") for j, t in enumerate("xy")
    }
    first = leave_one_target_out(pairs, fit_logistic, False)
    for source in "abc":
        pairs[source, "x"] = made_up(30, 99)
    second = leave_one_target_out(pairs, fit_logistic, False)
    for source in "abc":
        assert torch.equal(first[source, "x"], second[source, "x"])
        assert not torch.equal(first[source, "y"], second[source, "y"])


def test_shifted_images_keep_their_labels(samples: list[Sample]) -> None:
    shifted = Shifted(samples, draws=2, seed=0)
    assert len(shifted) == 8
    again = Shifted(samples, draws=2, seed=0)
    for index in range(8):
        original = samples[index // 2]
        assert torch.equal(shifted[index].target, original.target)
        assert shifted[index].name == f"{original.name}, {index % 2}"
        assert torch.equal(shifted[index].image, again[index].image)
        assert not torch.equal(shifted[index].image, original.image)
        assert (shifted[index].image.min(), shifted[index].image.max()) == (0, 1)
    assert not torch.equal(shifted[0].image, shifted[1].image)


def test_students_are_those_of_the_adapter(model: torch.nn.Module, samples: list[Sample]) -> None:
    student = Student(model, RATIO, seed=0)
    fusions = (tta.Fusion(weights=FIXED), tta.Fusion(gate=CupGate(RATIO)))
    adapters = [
        tta.DistilledFuse(
            model, fusions[0], predict=each, generator=torch.Generator().manual_seed(0)
        )
        for each in fusions
    ]
    frozen = tta.Fuse(model, weights=FIXED)
    for sample in samples:
        found = student(sample.image)
        for p, adapter in zip(found.values(), adapters, strict=True):
            expected = torch.sigmoid(adapter(sample.image[None]))[0]
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["distilled, fixed"], frozen(sample.image[None]).sigmoid()[0])
    (row,) = score_students([found], samples[-1:])
    for name, p in found.items():
        expected = dice(p >= 0.5, sample.target, 2).tolist()
        assert row["scores"][name] == pytest.approx(expected, abs=0.006)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    weights = ResUNet34(2).state_dict()
    for name in ("centre_a", "centre_b"):
        path = tmp_path / f"{name}.pt"
        save_source_model(path, Architecture(2, 64, name), weights, **describe(RATIO))
    words = ["composition", "--data-root", "synthetic", "--models", str(tmp_path), "--size", "64"]
    return [*words, "--width", "2", "--images", "2", "--out", str(tmp_path / "out")]


def test_it_is_resumed_pair_by_pair(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--sources", "centre_a", "--parts"]
    assert main([*words, "pairs"]) == 0
    files = sorted((tmp_path / "out" / "pairs" / "centre_a").iterdir())
    assert [file.stem for file in files] == ["centre_b", "centre_c", "centre_d", "centre_e"]
    record = json.loads(files[0].read_text())
    assert len(record["images"]) == 2
    assert record["cup_ratio"] == {"mean": 0.3, "deviation": 0.5}
    table = (tmp_path / "out" / "composition.md").read_text()
    assert table in capsys.readouterr().out
    assert "4 pairs" in table

    before = [file.read_text() for file in files]
    files[0].unlink()
    again = files[1].stat().st_mtime_ns
    assert main([*words, "pairs"]) == 0
    assert [json.loads(f.read_text())["images"] for f in files] == [
        json.loads(text)["images"] for text in before
    ]
    assert files[1].stat().st_mtime_ns == again
    capsys.readouterr()
    other = [*words, "pairs", "--targets", "centre_b", "--images", "1"]
    message = complaint_of(capsys, main, *other)
    assert "centre_b.json was made with images 2, not images 1; choose" in message
    assert "--overwrite" in message
    assert main([*other, "--overwrite"]) == 0
    assert [len(json.loads(file.read_text())["images"]) for file in files] == [1, 2, 2, 2]


def test_a_source_is_not_its_own_target(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--sources", "centre_a", "--targets", "centre_a"]
    assert "--targets is centre_a, the source itself" in complaint_of(capsys, main, *words)
    assert not (tmp_path / "out").exists()


def test_students_without_what_they_are_compared_with_are_told() -> None:
    alone = [record for record in records() if record["part"] == "distilled"]
    text = report(alone)
    assert "| variant |" not in text
    assert "Of 1 pair(s) that learn there is no table" in text
    assert "there is no table" not in report(records())


def test_every_part_runs(words: list[str], tmp_path: Path) -> None:
    words += ["--sources", "centre_a", "--targets", "centre_b", "--parts"]
    assert main([*words, "pairs,shifted,distilled"]) == 0
    out = tmp_path / "out"
    found = json.loads((out / "composition.json").read_text())
    assert [(r["part"], r["target"], len(r["images"])) for r in found] == [
        ("pairs", "centre_b", 2),
        ("shifted", "centre_a", 4),
        ("distilled", "centre_b", 2),
    ]
    table = (out / "composition.md").read_text()
    made_by = "Made by `python -m benchmarks composition --data-root synthetic --models MODELS "
    assert table.startswith(made_by)
    assert table.endswith(report(found))
    assert "| distilled, gated | 26 + 2 back |" in table
    assert "| all factors, by the source alone |" in table
