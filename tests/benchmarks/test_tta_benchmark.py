"""The tables of test-time adaptation: jobs that resume, counts, comparisons, choices, reports."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.__main__ import main
from benchmarks.fundus import pooled_interval
from benchmarks.tta import command, jobs
from benchmarks.tta import setting as settings
from benchmarks.tta.cost import Passes, PeakTensors
from benchmarks.tta.plot import plot_cosines
from benchmarks.tta.published import FIGURES, PAIRS, figures_of
from benchmarks.tta.report import report
from benchmarks.tta.selection import best, choose, left_out
from benchmarks.tta.setting import Setting
from benchmarks.tta.summary import by_target, compare, sign_test
from benchmarks.tta.tables import TABLES, variants_of
from benchmarks.tta.tabulation import tabulate
from benchmarks.tta.variants import Variant
from examples.common.adaptation import adapt_online
from examples.common.datasets import Sample
from examples.fundus.gate import CupRatio
from examples.fundus.heads import with_heads
from examples.fundus.methods import METHODS, Method
from examples.fundus.network import ResUNet34
from examples.fundus.objectives import OBJECTIVES
from examples.fundus.sample import DICE
from examples.fundus.source_model import Architecture, save_source_model
from examples.fundus.synthetic.export import export
from gradkit import tta

CPU = torch.device("cpu")
CENTRES = ("centre_a", "centre_c")


@pytest.fixture(scope="module")
def model() -> ResUNet34:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return ResUNet34(2).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: ResUNet34) -> Path:
    """Two centres of four photographs, and their source models."""
    root = tmp_path_factory.mktemp("tta") / "data"
    export(root, CENTRES, 4, 64, 0)
    models = root.parent / "models"
    models.mkdir()
    for source in CENTRES:
        save_source_model(models / f"{source}.pt", Architecture(2, 64, source), model.state_dict())
    return root


def words_of(data: Path, out: Path, *more: object) -> list[str]:
    words = ["tta", "--data-root", data, "--size", 64, "--width", 2, "--images", 2]
    return [str(word) for word in (*words, "--models", data.parent / "models", "--out", out, *more)]


def read(out: Path, pattern: str = "**/*.json") -> dict[str, Any]:
    """The jobs' records by file, without times."""
    found = {}
    for path in sorted((out / "jobs").glob(pattern)):
        record = json.loads(path.read_text())
        del record["milliseconds"]
        found[str(path.relative_to(out))] = record
    return found


# Arithmetic


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_test_is_scipys(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = (3, 20, 101, 700)[seed]
    differences = torch.randn(count, generator=generator).add(0.1).round(decimals=1)
    found = sign_test(differences.tolist())
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    assert (found.better, found.worse) == (better, worse)
    assert better + worse < count or count == 3  # some are 0
    expected = scipy.stats.binomtest(better, better + worse, 0.5).pvalue
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_without_differences() -> None:
    assert sign_test([0.0, 0.0]) == (0, 0, 1.0)
    assert sign_test([1.0] * 10).p == pytest.approx(2 / 2**10)


def test_an_image_counts_once_whatever_the_number_of_sources() -> None:
    scores = {
        ("a", "b"): [80.0, 90.0], ("a", "c"): [70.0, 74.0], ("b", "a"): [60.0, 61.0],
        ("b", "c"): [72.0, 76.0], ("c", "a"): [62.0, 65.0], ("c", "b"): [78.0, 94.0],
    }  # fmt: skip
    assert by_target(scores) == {"b": [79.0, 92.0], "c": [71.0, 75.0], "a": [61.0, 63.0]}
    reference = {pair: [value - 2 for value in own] for pair, own in scores.items()}
    reference["c", "b"] = [80.0, 94.0]  # by hand: differences -2 and 0, with the other source 0, 1
    line = compare(scores, {"none": reference, "same": scores}, seed=1)
    assert line["sources"] == {"a": 78.5, "b": (60.5 + 74) / 2, "c": (63.5 + 86) / 2}
    assert line["mean"] == pytest.approx(mean([85, 72, 60.5, 74, 63.5, 86]))
    against = line["against"]["none"]
    assert (against["better"], against["worse"], against["p"]) == (5, 0, 0.0625)
    assert against["difference"] == pytest.approx(mean([0.5, 2, 2]))
    assert against["interval"] == pooled_interval([[0.0, 1.0], [2.0, 2.0], [2.0, 2.0]], 1)
    assert line["interval"] == pooled_interval([[79.0, 92.0], [71.0, 75.0], [61.0, 63.0]], 1)
    assert line["worst"] == {"source": "c", "target": "b", "difference": -1.0}
    assert line["against"]["same"]["p"] == 1.0


def test_of_one_image_there_is_no_interval() -> None:
    scores = {("a", "b"): [80.0], ("b", "a"): [60.0, 61.0]}
    plain = {pair: [70.0] * len(own) for pair, own in scores.items()}
    found = compare(scores, {"none": plain, "ptbn": plain}, 1)
    assert found["interval"] is None
    assert found["against"]["none"]["interval"] is None
    own = {name: found[name] for name in ("interval", "mean", "against")}
    text = report(record("1", [{**line("x", "X", 70.0), **own}]))
    assert "| 70.25 [-] |" in text
    assert "| +0.25 [-] |" in text


def test_choosing_leaves_the_target_out_in_both_roles() -> None:
    pairs = [(s, t) for s in "abc" for t in "abc" if s != t]
    #                                  ab  ac  ba  bc  ca  cb
    table = {"steady": (80, 80, 80, 80, 80, 80),
             "good on a": (70, 70, 99, 70, 99, 70),
             "good from a": (99, 99, 70, 70, 70, 70),
             "good without c": (90, 60, 90, 60, 60, 60)}  # fmt: skip
    scores = {
        name: {pair: [float(value)] for pair, value in zip(pairs, values, strict=True)}
        for name, values in table.items()
    }
    # By hand: without a, b → c and c → b are left; without b, a → c and c → a; and so on.
    assert choose(scores, "a") == "steady"  # 80 to 70, 70, 60
    assert choose(scores, "b") == "good on a"  # (70 + 99)/2 = 84.5, equal to "good from a"
    assert choose(scores, "c") == "good without c"  # 90 to 80, 84.5, 84.5
    assert best(scores, "a") == "good on a"
    choices = {target: choose(scores, target) for target in "abc"}
    assert left_out(scores, choices) == {
        ("a", "b"): [70.0], ("a", "c"): [60.0], ("b", "a"): [80.0],
        ("b", "c"): [60.0], ("c", "a"): [80.0], ("c", "b"): [70.0],
    }  # fmt: skip
    two = {"one": {("a", "b"): [1.0], ("b", "a"): [2.0]}}
    with pytest.raises(ValueError, match="at least three"):
        choose(two, "a")


def test_the_papers_averages_are_those_of_its_domains() -> None:
    for name, figures in FIGURES.items():
        assert figures[5] == pytest.approx(mean(figures[:5]), abs=0.0061), name
    assert len(PAIRS) == 30
    assert PAIRS["con", "ent"] == FIGURES["grata"][5]
    assert PAIRS["ent", "con"] == FIGURES["ent-con"][5]
    assert figures_of("tent@0.001") == FIGURES["tent"]


# Cost


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [("none", 1, 0), ("none-views", 6, 0), ("tent", 2, 1), ("grata", 9, 2), ("dua", 7, 0),
     ("sar", 3, 2), ("memo", 7, 6), ("cotta", 8, 1)],
)  # fmt: skip
def test_passes_are_counted(model: ResUNet34, name: str, forwards: int, backwards: int) -> None:
    (variant,) = [each for each in variants_of("1", 1e-4) if each.name == name]
    adapter = variant.adapter(model, 0)
    with Passes() as passes:
        adapter(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert (passes.forwards, passes.backwards) == (forwards, backwards)
    adapter(torch.rand(1, 3, 64, 64))
    assert passes.forwards == forwards  # hooks are gone


def test_denoising_needs_a_head_whose_passes_count() -> None:
    variants = {each.name: each for each in variants_of("1", 1e-4) if each.heads}
    assert list(variants) == ["detta", "detta-released", "detta@1e-06"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        headed = ResUNet34(2, auxiliary_heads=True)
    for name, lr in (("detta", 1e-4), ("detta@1e-06", 1e-6)):
        adapter = variants[name].adapter(headed, 0)
        assert adapter.optimizer is not None
        assert adapter.optimizer.param_groups[0]["lr"] == lr
        with Passes() as passes:
            adapter(torch.rand(1, 3, 64, 64))
        assert (passes.forwards, passes.backwards) == (2, 1)


def test_a_variant_that_sees_the_target_first(model: ResUNet34) -> None:
    """The same predictions as the command's; passes and memory include the earlier adaptation."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(2, 64, 64)
    target[:, 10:50, 20:40] = 1
    samples = [
        Sample(f"{n}.png", torch.rand(3, 64, 64, generator=generator), target) for n in range(3)
    ]
    found = []
    for size in (2, None):
        variant = Variant("x", "x", None, target_first=size)
        rows, cost = jobs.adapt(tta.TENT(model, 0.1), samples, CPU, variant)
        stream = adapt_online(tta.TENT(model, 0.1), samples, CPU, DICE, target_first=size)
        for row, scored in zip(rows, stream.scores, strict=True):
            assert row["scores"]["after"] == pytest.approx(scored.scores, abs=1e-3)
        assert (cost["forwards"], cost["backwards"]) == (2, 1)
        found.append(([row["scores"] for row in rows], cost["megabytes"]))
    (first, of_two), (online, of_one) = found
    assert first != online
    assert of_two > 1.5 * of_one  # a batch of two
    released = [each for each in variants_of("1", 1e-4) if each.target_first]
    assert [(each.name, each.target_first) for each in released] == [("detta-released", 8)]


def test_peak_memory_is_that_of_tensors_alive_together() -> None:
    start = torch.zeros(1000)
    with PeakTensors() as memory:
        x = start * 2  # 4000 bytes
        x.add_(1)
        kept = [x.view(10, 100), x[:5]]
        for _ in range(3):
            y = x + 1
            del y
    assert memory.peak == 8000
    w = torch.ones(1000, requires_grad=True)
    with PeakTensors() as memory:
        (w.exp().exp()).sum().backward()
    assert memory.peak >= 3 * 4000
    assert len(kept) == 2


def test_measuring_does_not_change_what_a_method_predicts(model: ResUNet34) -> None:
    images = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    one, two = (tta.GraTa(model, lr=1e-2) for _ in range(2))
    with PeakTensors(), Passes():
        measured = [one(image) for image in images]
    assert torch.equal(torch.stack(measured), torch.stack([two(image) for image in images]))


# Variants


def test_names_tell_variants_apart_and_every_method_is_there() -> None:
    for table in TABLES:
        variants = variants_of(table, 1e-4)
        names = [variant.name for variant in variants]
        assert len(set(names)) == len(names), table
        for variant, copy in zip(variants, pickle.loads(pickle.dumps(variants)), strict=True):
            assert copy.name == variant.name  # other processes get them
        if table != "figure4":
            assert names[:2] == ["none", "ptbn"]
    assert set(METHODS) <= {variant.name for variant in variants_of("1", 1e-4)}
    pairs = {each.objectives for each in variants_of("5", 1e-4)} - {None}
    assert pairs == {(pseudo, auxiliary) for pseudo in OBJECTIVES for auxiliary in OBJECTIVES}
    # A variant with the usual learning rate and another are not mixed up.
    usual, other = ({each.name for each in variants_of("4", lr)} for lr in (1e-4, 1e-3))
    assert usual & other == {"none", "ptbn"}


@pytest.mark.parametrize("table", ["2", "3", "4", "6"])
def test_variants_can_be_made(model: ResUNet34, table: Any) -> None:
    for variant in variants_of(table, 1e-3):
        adapter = variant.adapter(model, 0, 0.25)
        lr = None if adapter.optimizer is None else adapter.optimizer.param_groups[0]["lr"]
        if variant.scale_of is not None:
            assert variant.scale_of == "grata@0.001"
            assert lr == 0.25e-3
            assert adapter.optimizer.transforms[-1].activation == "constant"
        assert adapter.statistics is not None


def test_the_gate_knows_the_ratio_of_its_source(
    data: Path, tmp_path: Path, model: ResUNet34, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gated,) = [each for each in variants_of("1", 1e-4) if each.ratio]
    assert gated.name == "gated"
    setting = Setting(str(data), 1.0, 64, 2, 1, 1, None, "cpu", data.parent / "models", tmp_path)
    asked: list[Any] = []

    def measured(samples: Any) -> CupRatio:
        asked.extend(sample.name for sample in samples)
        return CupRatio(0.5, 0.1)

    monkeypatch.setattr(jobs, "measure_cup_ratio", measured)
    jobs.run(jobs.Job(setting, 0, "centre_a", "centre_c", gated))
    assert asked
    assert all(name.startswith("centre_a") for name in asked)  # no label of the target


def test_grata_by_its_objectives_is_the_registered_one(model: ResUNet34) -> None:
    (pair,) = [each for each in variants_of("3", 1e-2) if each.name == "grata@0.01"]
    linear = next(each for each in variants_of("4", 1e-2) if each.name == "con-ent-linear@0.01")
    adapters = [pair.adapter(model, 5), linear.adapter(model, 5)]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for adapter in adapters:
        adapter(image)
    steps = [adapter.last_step for adapter in adapters]
    assert torch.equal(steps[0].losses, steps[1].losses)
    cosine = steps[0].cosine("pseudo", "auxiliary")
    assert steps[1].lr_scale == pytest.approx(float(cosine + 1) / 2)
    assert steps[0].lr_scale == pytest.approx(float(cosine + 1) ** 2 / 4)


def test_cosine_with_the_gradient_of_the_labels(model: ResUNet34) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(2, 64, 64)
    target[:, 20:40, 20:40] = 1
    samples = [
        Sample(f"{n}.png", torch.rand(3, 64, 64, generator=generator), target) for n in range(3)
    ]

    def supervised(model: Any, image: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(model(image), target[None])

    def opposed(model: Any, image: torch.Tensor) -> torch.Tensor:
        return -supervised(model, image)

    for objective, expected in ((supervised, 1.0), (opposed, -1.0)):
        adapter = tta.TENT(model, 1e-2, objective=objective)
        variant = Variant("x", "x", lambda *_: adapter, empirical=True)
        rows, _ = jobs.adapt(adapter, samples, CPU, variant)
        assert [row["empirical"] for row in rows] == [expected] * 3
    plain, _ = jobs.adapt(
        tta.TENT(model, 1e-2, objective=supervised), samples, CPU, Variant("x", "x", None)
    )
    again, _ = jobs.adapt(
        tta.TENT(model, 1e-2, objective=supervised), samples, CPU,
        Variant("x", "x", None, empirical=True),
    )  # fmt: skip
    assert [row["scores"] for row in plain] == [row["scores"] for row in again]


def test_predictions_before_after_and_over_views(model: ResUNet34) -> None:
    target = torch.zeros(2, 64, 64)
    target[:, 10:50, 20:40] = 1
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(f"{n}.png", torch.rand(3, 64, 64, generator=generator), target) for n in range(2)
    ]
    variant = Variant("x", "x", None, predictions=("before", "after", "views"))
    rows, _ = jobs.adapt(tta.TENT(model, 0.1), samples, CPU, variant)
    after, _ = jobs.adapt(tta.TENT(model, 0.1), samples, CPU, Variant("x", "x", None))
    before, _ = jobs.adapt(
        tta.TENT(model, 0.1, predict="before"), samples, CPU, Variant("x", "x", None)
    )
    for row, one, other in zip(rows, after, before, strict=True):
        assert row["scores"]["after"] == one["scores"]["after"]
        assert row["scores"]["before"] == other["scores"]["after"]
    still = tta.PTBN(model, "source")
    rows, _ = jobs.adapt(
        still, samples, CPU, Variant("x", "x", None, predictions=("after", "views"))
    )
    fused, _ = jobs.adapt(
        tta.Fuse(model, ("source",), image_share=0), samples, CPU, Variant("x", "x", None)
    )
    for row, one in zip(rows, fused, strict=True):
        assert row["scores"]["views"] == one["scores"]["after"]


def test_pairs_of_objectives_with_heads(tmp_path: Path) -> None:
    """Each adapts, super-resolution from 128 pixels; others adapt the network without its heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        headed = ResUNet34(2, auxiliary_heads=True)
    save_source_model(
        tmp_path / "centre_a.pt", Architecture(2, 128, "centre_a", True), headed.state_dict()
    )
    setting = Setting("synthetic", 1.0, 128, 2, 1, 1, 2, "cpu", tmp_path, tmp_path)
    chosen = {"rec-rot", "sup-den", "none"}
    for variant in variants_of("5", 1e-2):
        if variant.name.partition("@")[0] in chosen:
            job = jobs.Job(setting, 0, "centre_a", "centre_b", variant)
            jobs.run(job)
            result = job.result()
            assert result is not None
            expected = {"none": (1, 0), "rec-rot@0.01": (3, 2), "sup-den@0.01": (3, 2)}
            assert (result["forwards"], result["backwards"]) == expected[variant.name]
            assert ("cosine" in result["images"][0]) == (variant.name != "none")


# The command


@pytest.fixture(scope="module")
def second(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 2 without interruption."""
    out = tmp_path_factory.mktemp("second")
    assert main(words_of(data, out, "--table", 2, "--lr", 0.01)) == 0
    return out


def test_a_table_beside_the_papers(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((second / "table2@0.01.json").read_text())
    text = (second / "table2@0.01.md").read_text()
    assert text == report(record)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    first = rows[: 1 + len(record["lines"])]
    assert {row.count("|") for row in first} == {1 + 1 + 2 + 1 + 6}  # name, sources, mean, paper
    titles = ["No Adapt", "PTBN", "L_con(θ), lr β", "L_con(θ - ∇L_ent), lr β"]
    titles += ["L_con(θ - ∇L_ent), lr η (GraTa)", "GraTa, its mean learning rate held constant"]
    assert [row.split(" | ")[0].removeprefix("| ") for row in first[1:]] == titles
    assert "| 78.35 | 78.50 | 69.24 | 52.13 | 68.74 | 69.39 |" in first[3]
    found = read(second)
    assert len(found) == 2 * len(titles)
    for line in record["lines"]:
        own = [each for each in found.values() if each["variant"] == line["variant"]]
        for each in own:
            scores = [mean(image["scores"]["after"].values()) for image in each["images"]]
            assert len(scores) == 2
            assert line["sources"][each["source"]] == pytest.approx(mean(scores))
    assert [line["forwards"] for line in record["lines"]] == [1, 1, 8, 9, 9, 9]
    assert [line["backwards"] for line in record["lines"]] == [0, 0, 1, 2, 2, 2]
    assert "--table 2" in record["command"]
    assert str(second) not in text


def test_the_constant_rate_is_gratas_mean(
    second: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same pair, from the file that GraTa's job has left."""
    seen = []
    original = command.variants_of

    def spy(model: Any, chosen: Any) -> None:
        seen.append(chosen.lr)

    def spied(table: Any, lr: float) -> list[Variant]:
        return [
            Variant("spy", "spy", spy, lr=1.0, scale_of="grata@0.01")
            if variant.name == "grata-mean@0.01"
            else variant
            for variant in original(table, lr)
        ]

    monkeypatch.setattr(command, "variants_of", spied)
    assert main(words_of(data, second, "--table", 2, "--lr", 0.01)) == 0
    records = read(second, "**/grata@0.01.json").values()
    expected = [mean(image["lr_scale"] for image in record["images"]) for record in records]
    assert seen == expected
    assert all(0 < scale < 1 for scale in expected)


def test_an_interrupted_run_goes_on(
    second: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = words_of(data, tmp_path, "--table", 2, "--lr", 0.01, "--methods")
    words.append("grata@0.01,grata-mean@0.01")
    original, done = jobs.adapt, []

    def stopping(*arguments: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(jobs, "adapt", stopping)
    assert main(words) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    kept = read(tmp_path)
    assert len(kept) == 3
    assert not list((tmp_path / "jobs").glob("**/*.part"))
    assert not (tmp_path / "table2@0.01.md").exists()
    times = {path: (tmp_path / path).stat().st_mtime_ns for path in kept}

    monkeypatch.setattr(jobs, "adapt", original)
    assert main(words) == 0
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in kept} == times
    found = read(tmp_path)
    assert len(found) == 8
    assert found.items() <= read(second).items()

    monkeypatch.setattr(jobs, "adapt", None)  # nothing is left to do
    assert main(words) == 0


def test_a_failure_is_told_and_the_rest_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, chosen: Any) -> tta.Adapter:
        raise ValueError("no such\nthing")

    first = variants_of("1", 1e-4)[:2]
    both = [*first, Variant("broken", "Broken", broken)]
    monkeypatch.setattr(command, "variants_of", lambda table, lr: both)
    assert main(words_of(data, tmp_path, "--table", 1)) == 0
    output = capsys.readouterr()
    failure = "centre_a → centre_c, Broken: ValueError: no such thing"
    assert f"failed: {failure}" in output.err
    assert f"- {failure}" in output.out
    assert "| Broken |" not in output.out
    monkeypatch.setattr(command, "variants_of", lambda table, lr: first)
    assert main(words_of(data, tmp_path, "--table", 1)) == 0
    assert "Broken" not in capsys.readouterr().out


def test_what_is_refused(
    second: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*words: object, out: Path = tmp_path) -> str:
        assert main(words_of(data, out, "--table", 2, *words)) == 2
        output = capsys.readouterr()
        assert output.err.count("\n") == 1
        return output.err

    assert "made with images 2, not 1" in complaint("--images", 1, out=second)
    assert "--shift is for synthetic centres" in complaint("--shift", 0.5)
    assert "--seeds is 0" in complaint("--seeds", 0)
    assert "unknown name 'grate'" in complaint("--methods", "grate")
    assert "auxiliary heads, which rec-con need" in complaint("--table", 5, "--methods", "rec-con")
    broken = tmp_path / "jobs/seed0/centre_a/centre_c/none.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    assert f"{broken} cannot be read; remove it" in complaint("--methods", "none")
    broken.write_text(json.dumps({"model": "0"}))
    assert "made with another source model of centre_a" in complaint("--methods", "none")


def test_variants_that_need_heads_take_them_from_a_folder_of_their_own(
    data: Path, tmp_path: Path, model: ResUNet34, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that they join the results of models without heads."""
    heads = tmp_path / "heads"
    heads.mkdir()
    headed = with_heads(model, 1)
    for source in CENTRES:
        save_source_model(
            heads / f"{source}.pt", Architecture(2, 64, source, True), headed.state_dict()
        )
    out = tmp_path / "out"
    words = words_of(data, out, "--table", 1, "--images", 1, "--methods")
    assert main([*words, "none"]) == 0
    before = read(out)
    assert main([*words, "detta,detta-released", "--heads", str(heads)]) == 0
    after = read(out)
    assert {name: after[name] for name in before} == before
    for name, record in after.items():
        folder = heads if "detta" in name else data.parent / "models"
        assert record["model"] == settings.checksum(folder / f"{record['source']}.pt")
    record = json.loads((out / "table1.json").read_text())
    assert [line["variant"] for line in record["lines"]] == [
        "none", "ptbn", "detta", "detta-released",
    ]  # fmt: skip
    assert record["command"].endswith("--heads HEADS")
    capsys.readouterr()

    with torch.no_grad():
        headed.seg_head.weight.add_(1)
    other = heads / "centre_a.pt"
    save_source_model(other, Architecture(2, 64, "centre_a", True), headed.state_dict())
    settings.load_model.cache_clear()
    assert main([*words, "detta", "--heads", str(heads)]) == 2
    assert f"{other} is not the source model {data.parent}" in capsys.readouterr().err


def test_source_models_are_trained_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(data, tmp_path, "--table", 1, "--methods", "none", "--images", 1)
    words[words.index("--models") + 1] = str(tmp_path / "own")
    words += ["--epochs", "1", "--train-images", "2"]
    assert main(words) == 0
    files = sorted((tmp_path / "own").glob("**/centre_?.pt"))
    assert files == [tmp_path / f"own/seed0/{name}/{name}.pt" for name in CENTRES]
    monkeypatch.setattr(settings, "train_source", None)
    assert main(words) == 0


def test_where_source_models_are_looked_for(tmp_path: Path) -> None:
    setting = Setting("synthetic", 1.0, 64, 2, 1, 1, None, "cpu", tmp_path, tmp_path)
    fresh = tmp_path / "seed0/centre_a/centre_a.pt"
    assert setting.model_file(0, "centre_a") == fresh
    flat = tmp_path / "centre_a.pth"  # of a release: for seed 0 alone
    flat.write_text("")
    assert setting.model_file(0, "centre_a") == flat
    assert setting.model_file(1, "centre_a") == tmp_path / "seed1/centre_a/centre_a.pt"
    fresh.parent.mkdir(parents=True)
    fresh.write_text("")
    assert setting.model_file(0, "centre_a") == fresh


def test_a_checkpoint_with_the_released_names_is_read(tmp_path: Path, model: ResUNet34) -> None:
    torch.save(model.state_dict(), tmp_path / "centre_a.pth")
    loaded = settings.load_model(tmp_path / "centre_a.pth", 2, 64, "centre_a", "cpu")
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))


def test_synthetic_targets_are_the_same_for_all_seeds_and_shift(tmp_path: Path) -> None:
    strong, half = (
        Setting("synthetic", shift, 64, 2, 3, 1, 2, "cpu", tmp_path, tmp_path)
        for shift in (1.0, 0.5)
    )
    assert len(strong.centres()) == 5
    assert len(strong.target("centre_d")) == 3
    assert len(strong.source("centre_d")) == 2
    one, two = (setting.target("centre_d")[0] for setting in (strong, half))
    assert one.name == two.name
    assert not torch.equal(one.image, two.image)
    assert strong.described() != half.described()


# From files to the record of a table


def fabricated(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int, value: Any
) -> list[jobs.Job]:
    """Jobs of three centres whose files are there; `value` is a number of an image."""
    monkeypatch.setattr(jobs, "checksum", lambda path: "m")
    setting = Setting("synthetic", 1.0, 64, 2, 2, 1, 2, "cpu", tmp_path, tmp_path)
    made = [
        jobs.Job(setting, seed, source, target, variant)
        for variant in variants_of(table, 1e-4)
        for seed in range(seeds)
        for source in "abc"
        for target in "abc"
        if source != target
    ]
    for job in made:
        images = []
        for place in range(2):
            numbers = {name: value(job, name, place) for name in job.variant.predictions}
            scores = {name: {"disc": v + 5, "cup": v - 5} for name, v in numbers.items()}
            images.append({"image": str(place), "scores": scores, "empirical": numbers["after"]})
        cost = {"forwards": 2, "backwards": 1, "megabytes": 1.0, "milliseconds": 3.0}
        own = {"source": job.source, "target": job.target, "seed": job.seed, "model": "m"}
        job.file.parent.mkdir(parents=True, exist_ok=True)
        job.file.write_text(json.dumps({**own, **cost, "images": images}))
    return made


def test_the_product_chooses_for_each_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(job: jobs.Job, prediction: str, place: int) -> float:
        if job.variant.name == "mixed0.8+con" and prediction == "views":
            return 90.0 if "a" not in (job.source, job.target) else 60.0
        if job.variant.name == "test+ent" and prediction == "before":
            return 85.0
        return 80.0 if job.variant.name == "ptbn" else 70.0 + place

    made = fabricated("6", tmp_path, monkeypatch, 1, value)
    found = tabulate("6", made)
    assert found["images"] == {"b": 2, "c": 2, "a": 2}
    chosen = {row["target"]: row for row in found["chosen"]}
    # For a the pairs of b and c count, where the first is at 90; for b and c it is at 60.
    assert chosen["a"]["chosen"] == "mixed:0.8, consistency, views"
    assert chosen["b"]["chosen"] == chosen["c"]["chosen"] == "test, entropy, before"
    assert (chosen["a"]["score"], chosen["b"]["score"]) == (60.0, 85.0)
    assert chosen["a"]["best"] == "test, entropy, before"
    assert (chosen["a"]["best_score"], chosen["a"]["ptbn"], chosen["a"]["none"]) == (85, 80, 70.5)
    selected = {line["title"]: line for line in found["selected"]}
    honest = selected["chosen without the target"]
    assert honest["mean"] == pytest.approx((60 + 85 + 85) / 3)
    assert honest["against"]["ptbn"]["difference"] == pytest.approx((-20 + 5 + 5) / 3)
    assert selected["best in hindsight"]["mean"] == pytest.approx(85.0)
    made[-1].file.unlink()  # a variant with a job left to do has no line
    names = {line["variant"] for line in tabulate("6", made)["lines"]}
    assert made[-1].variant.name not in names
    assert len(names) == len({job.variant.name for job in made}) - 1


def test_cosines_are_averaged_by_source_and_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": 0.5, "b": -0.1, "c": 0.2}

    def value(job: jobs.Job, prediction: str, place: int) -> float:
        ahead = (0.02 if place else 0.01) if job.variant.name.count("-") == 2 else 0.0
        return values[job.source] + (0.1 if job.seed else -0.1) + (0.05 if place else -0.05) + ahead

    made = fabricated("figure4", tmp_path, monkeypatch, 2, value)
    lines = tabulate("figure4", made)["lines"]
    assert [line["variant"] for line in lines] == [
        f"{name}-empirical" for name in ("ent", "ent-con", "con", "con-ent")
    ]
    for line in lines:
        gain = line.get("empirical_gain", 0.0)
        assert line["empirical_by_source"] == pytest.approx(
            {source: cosine + gain for source, cosine in values.items()}
        )
        assert line["empirical_positive"] == pytest.approx(2 / 3)
        low, high = line["empirical_interval"]
        assert 0.14 < low < 0.2 + gain < high < 0.28  # images are at 0.15 and 0.25
        if line["variant"].count("-") == 1:
            assert "empirical_gain" not in line
        else:  # of the same images, and not of others
            assert gain == pytest.approx(0.015)
            low, high = line["empirical_gain_interval"]
            assert 0.0099 < low < 0.015 < high < 0.0201


# Reports of the tables with a shape of their own


def line(name: str, title: str, value: float, **more: Any) -> dict[str, Any]:
    against = {"difference": value - 70, "interval": (value - 71, value - 69)}
    against |= {"better": 3, "worse": 1, "p": 0.625}
    return {
        "variant": name, "title": title, "prediction": "after", "product": False,
        "objectives": None, "sources": {"a": value, "b": value}, "mean": value,
        "interval": (value - 1, value + 1), "against": {"none": against, "ptbn": against},
        "worst": {"source": "a", "target": "b", "difference": -0.5}, "forwards": 2.0,
        "backwards": 1.0, "milliseconds": None, "megabytes": 1.5, "cosine": None,
        "lr_scale": None, "seeds": [value], **more,
    }  # fmt: skip


def record(table: str, lines: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    setting = {"data": "synthetic", "centres": ["a", "b"], "shift": 0.5, "size": 64, "width": 2}
    return {
        "table": table, "command": "python", "machine": {}, "setting": setting, "seeds": 1,
        "lr": 1e-4, "images": {"a": 2, "b": 2}, "lines": lines, "failures": [], **more,
    }  # fmt: skip


def test_pairs_of_objectives_are_a_square() -> None:
    lines = [line("none", "No Adapt", 70.0), line("ptbn", "PTBN", 71.0)]
    lines += [
        line(f"{p}-{a}", f"{p} ahead of {a}", 72.0 + n, objectives=(p, a))
        for n, (p, a) in enumerate([("con", "con"), ("con", "ent"), ("ent", "con"), ("ent", "ent")])
    ]
    text = report(record("5", lines))
    assert "| con | 72.00 | 73.00 (74.34) |\n| ent | 74.00 (71.47) | 75.00 |" in text
    assert "| con | +2.00 [+1.00, +3.00] | +3.00 [+2.00, +4.00] |" in text
    assert "at strength 0.5 of their shift" in text


def test_the_product_is_statistics_and_methods_by_predictions() -> None:
    lines = [line("none", "No Adapt", 70.0), line("ptbn", "PTBN", 71.0)]
    lines += [
        line("x", "test, entropy", value, product=True, prediction=prediction)
        for prediction, value in (("before", 72.0), ("after", 73.0), ("views", 74.0))
    ]
    lines.append(line("y", "test, nothing learnt", 75.0, product=True))
    row = {"target": "a", "chosen": "X", "score": 72.5, "best": "Y", "best_score": 75.0,
           "none": 70.0, "ptbn": 71.0}  # fmt: skip
    selected = [line("", "chosen without the target", 72.5)]
    text = report(record("6", lines, chosen=[row], selected=selected))
    assert (
        "| test, entropy | 72.00 | 73.00 | 74.00 |\n| test, nothing learnt | - | 75.00 | - |"
        in text
    )
    assert "| a | X | 72.50 | Y | 75.00 | 70.00 | 71.00 |" in text
    few = report(record("6", lines, chosen=[], selected=[]))
    assert "no choice with fewer than three centres" in few


def test_cosines_as_a_table_and_a_picture(tmp_path: Path) -> None:
    lines = [
        {"title": title, "empirical_by_source": {"a": value, "b": -value}, "variant": title,
         "empirical_interval": (-0.1, 0.1), "empirical_positive": 0.5}
        for title, value in (("one", 0.2), ("two", 0.3), ("three", -0.1), ("four", 0.4))
    ]  # fmt: skip
    text = report(record("figure4", lines))
    assert "| two | +0.300 | -0.300 | +0.000 [-0.100, +0.100] | - | 50 |" in text
    plot_cosines(lines, tmp_path / "cosines.png")
    with Image.open(tmp_path / "cosines.png") as picture:
        assert min(picture.size) > 300


def test_a_method_of_ones_own_is_in_the_first_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Method("Mine", lambda model, chosen: tta.TENT(model, 1e-3), "test")
    monkeypatch.setitem(METHODS, "mine", own)
    words = words_of(data, tmp_path, "--table", 1, "--methods", "mine")
    assert main(words) == 0
    table = (tmp_path / "table1.md").read_text()
    assert "| Mine |" in table
    assert "| DUA |" not in table
