"""The commands: what they write, bad input, and that the same command goes on after Ctrl-C."""

import json
import math

import numpy as np
import pytest
from helpers import complaint_of
from PIL import Image

from examples.common import training as common_training
from examples.common.checkpoint import load
from examples.fundus.semi import main as fundus
from examples.prostate.__main__ import main as prostate
from examples.prostate.task import TASK
from examples.semi import commands, comparison
from examples.semi.data import open_site
from examples.semi.training import Run

METHODS = "supervised,fixmatch,divergence:critic"
TINY = ["--size", "32", "--width", "2", "--iterations", "4", "--every", "2", "--batch-size", "2"]
TINY += ["--labels", "6", "--train-images", "15", "--test-images", "13"]
SITES = ["--sites", "site_a,site_b"]


def run(*words, main=prostate):
    return main([str(word) for word in words])


@pytest.fixture
def no_figures(monkeypatch):
    """For speed, where figures are not what is tested."""
    for name in ("save_curves", "save_predictions", "save_features"):
        monkeypatch.setattr(comparison, name, lambda *arguments: None)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    words = ["compare", *TINY, *SITES, "--methods", METHODS, "--seeds", 2, "--out", out]
    assert run(*words) == 0
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported") / "data"
    words = ["--train-images", 15, "--test-images", 12, "--size", 32, "--out", root]
    assert run("export", *SITES, *words) == 0
    return root


# What the commands write


def test_results_follow_the_schema(compared):
    for name in ("results.json", "student.json"):
        results = read(compared / name)
        assert [(r["method"], r["seed"], r["site"]) for r in results] == [
            (method, seed, site)
            for method in METHODS.split(",")
            for seed in (0, 1)
            for site in ("site_a", "site_b")
        ]
        for result in results:
            assert list(result) == [
                "method", "site", "seed", "n", "dice", "jaccard", "hd95", "asd", "images",
            ]  # fmt: skip
            assert result["n"] == len(result["images"]) == 13
            for score in ("dice", "jaccard", "hd95", "asd"):
                values = [image[score] for image in result["images"]]
                assert result[score] == pytest.approx(sum(values) / 13, rel=1e-12)
            assert all(0 <= image["dice"] <= 100 for image in result["images"])
            samples = open_site(TASK, "synthetic", result["site"], "test", 32, 0, 13)
            names = [image["image"] for image in result["images"]]
            assert names == [samples[index].name for index in range(13)]


def test_the_table_holds_the_means(compared):
    table = (compared / "table.md").read_text()
    results = read(compared / "results.json")
    for method in METHODS.split(","):
        for site in ("site_a", "site_b"):
            own = [r for r in results if (r["method"], r["site"]) == (method, site)]
            dice, distance = (sum(r[name] for r in own) / 2 for name in ("dice", "hd95"))
            (line,) = [x for x in table.splitlines() if x.startswith(f"| {method} | {site} | 13 |")]
            assert f"| {dice:.2f} [" in line
            assert f"| {distance:.2f} |" in line
        own = [r["dice"] for r in results if r["method"] == method]
        (average,) = [x for x in table.splitlines() if f"| {method} | average over sites" in x]
        assert f"| 26 | {sum(own) / 4:.2f} [" in average
        seeds = [sum(own[place : place + 2]) / 2 for place in (0, 2)]
        (line,) = [x for x in table.splitlines() if x.startswith(f"| {method} | {seeds[0]:.2f}")]
        assert line.startswith(f"| {method} | {seeds[0]:.2f} | {seeds[1]:.2f} | {sum(own) / 4:.2f}")
    assert "difference from `fixmatch`" in table
    assert "reconstruction from DiM's abstract" in table


def test_figures_are_pictures(compared):
    for name in ("curves.png", "predictions.png", "tsne.png"):
        with Image.open(compared / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 20


def test_curves_and_tensorboard_have_every_validation(compared):
    folder = compared / "training" / "divergence-critic_site_a_1"
    history = load(folder / "last.pt")["history"]
    assert [list(entry) for entry in history] == 2 * [
        ["epoch", "task", "divergence", "dice_site_a", "loss_site_a", "dice_site_b", "loss_site_b"]
    ]
    (events,) = folder.glob("events.out.tfevents.*")
    assert events.read_bytes().count(b"loss_site_b") == 2


def test_evaluate_gives_the_scores_of_compare(compared, tmp_path):
    checkpoint = compared / "training" / "divergence-critic_site_a_1" / "best.pt"
    for student, name in (([], "results"), (["--student"], "student")):
        words = ["evaluate", "--checkpoint", checkpoint, *SITES, "--test-images", 13, *student]
        assert run(*words, "--out", tmp_path) == 0
        expected = [
            r
            for r in read(compared / f"{name}.json")
            if (r["method"], r["seed"]) == ("divergence:critic", 1)
        ]
        assert read(tmp_path / "results.json") == expected
    assert (tmp_path / "table.md").exists()


def test_train_is_a_part_of_compare(compared, tmp_path, capsys):
    words = ["train", *TINY, *SITES, "--method", "divergence:critic", "--seed", 1]
    assert run(*words, "--out", tmp_path) == 0
    best = tmp_path / "training" / "divergence-critic_site_a_1" / "best.pt"
    assert f"best weights: {best}" in capsys.readouterr().out
    other = load(compared / "training" / best.parent.name / "best.pt")
    found = load(best)
    for name in ("model", "teacher"):
        for key, value in found[name].items():
            assert value.equal(other[name][key])


@pytest.mark.usefixtures("no_figures")
def test_a_finished_comparison_is_not_trained_again(compared, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in compared.rglob("*.pt")}
    results = read(compared / "results.json")
    monkeypatch.setattr(common_training, "run_epoch", None)
    words = ["compare", *TINY, *SITES, "--methods", METHODS, "--seeds", 2, "--out", compared]
    assert run(*words) == 0
    assert read(compared / "results.json") == results
    assert {path: path.read_bytes() for path in compared.rglob("*.pt")} == before
    error = capsys.readouterr().err
    assert error.count("is finished after 2 validations; --overwrite trains anew") == 6
    assert "going on" not in error


def test_a_training_that_patience_has_ended_is_finished(tmp_path, monkeypatch, capsys):
    """Every validation is as good as the first, so that of four the second is the last."""
    monkeypatch.setattr(Run, "validate", lambda self: {"dice_site_a": 50.0, "loss_site_a": 1.0})
    words = ["train", *TINY, *SITES, "--method", "supervised", "--iterations", 8]
    words += ["--patience", 1, "--out", tmp_path]
    assert run(*words) == 0
    capsys.readouterr()
    monkeypatch.setattr(common_training, "run_epoch", None)
    assert run(*words) == 0
    assert "supervised_site_a_0 is finished after 2 validations" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_the_same_command_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    words = ["compare", *TINY[:-1], 2, *SITES, "--methods", "supervised,fixmatch"]
    real, calls = common_training.run_epoch, []

    def interrupted(training, epoch):
        calls.append(epoch)
        if len(calls) == 4:  # the second epoch of the second training
            raise KeyboardInterrupt
        return real(training, epoch)

    monkeypatch.setattr(common_training, "run_epoch", interrupted)
    assert run(*words, "--out", tmp_path / "parts") == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on from there\n")
    assert not (tmp_path / "parts" / "results.json").exists()
    assert run(*words, "--out", tmp_path / "parts") == 0
    assert calls == [0, 1, 0, 1, 1]
    error = capsys.readouterr().err
    assert "supervised_site_a_0 is finished after 2 validations" in error
    assert "going on with" in error
    assert "fixmatch_site_a_0 after 1 validations" in error
    assert run(*words, "--out", tmp_path / "whole") == 0
    assert read(tmp_path / "parts" / "results.json") == read(tmp_path / "whole" / "results.json")


@pytest.mark.usefixtures("no_figures")
def test_a_folder_in_the_published_layout_gives_the_same_numbers(exported, compared, tmp_path):
    """The generator draws 8-bit pictures, so that nothing is lost on disk."""
    words = ["compare", *TINY, *SITES, "--methods", "fixmatch", "--data-root", exported]
    assert run(*words, "--out", tmp_path) == 0
    found = [r["images"][:12] for r in read(tmp_path / "results.json")]
    expected = [
        r["images"][:12]
        for r in read(compared / "results.json")
        if (r["method"], r["seed"]) == ("fixmatch", 0)
    ]
    assert found == expected


def test_exported_masks_are_inverted(exported):
    with Image.open(exported / "site_b" / "train" / "mask" / "02_01.png") as picture:
        mask = np.array(picture)
    assert set(np.unique(mask)) == {0, 255}
    assert 0 < (mask == 0).mean() < 0.2
    for split, count in (("train", 15), ("test", 12)):
        assert len(list((exported / "site_a" / split / "image").glob("*.png"))) == count


def test_overwrite_trains_anew(tmp_path, capsys):
    words = ["train", *TINY, *SITES, "--method", "supervised", "--out", tmp_path]
    assert run(*words) == 0
    folder = tmp_path / "training" / "supervised_site_a_0"
    (folder / "notes.txt").write_text("mine")
    other = [word if word != "6" else "5" for word in words]
    assert run(*other) == 2
    assert "labels 6, not 5; repeat that value, or start anew" in capsys.readouterr().err
    assert run(*other, "--overwrite") == 0
    assert load(folder / "last.pt")["settings"]["labels"] == 5
    assert (folder / "notes.txt").exists()
    assert len(list(folder.glob("events*"))) == 1


def test_other_data_are_refused(exported, tmp_path, capsys):
    words = ["train", *TINY, *SITES, "--method", "supervised", "--out", tmp_path]
    assert run(*words) == 0
    assert run(*words, "--data-root", exported) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "belongs to a training on other data (synthetic" in last


def test_fundus_photographs(tmp_path, capsys):
    root = tmp_path / "data"
    words = ["--train-images", 12, "--test-images", 2, "--size", 32, "--out", root]
    sites = ["--sites", "centre_a,centre_c"]
    assert run("export", *sites, *words, main=fundus) == 0
    assert (root / "centre_c" / "test" / "ROIs" / "mask").is_dir()
    words = ["compare", *TINY, *sites, "--data-root", root, "--methods", "dim", "--patience", 1]
    assert run(*words, "--out", tmp_path / "out", main=fundus) == 0
    for result in read(tmp_path / "out" / "results.json"):
        assert result["n"] == 2
        for name in ("dice", "jaccard", "hd95", "asd"):
            halves = [result[f"{structure}_{name}"] for structure in ("disc", "cup")]
            assert result[name] == pytest.approx(sum(halves) / 2)
            assert math.isfinite(result[name])


# Bad input: status 2, one line on standard error, nothing computed


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("computed before everything was checked")

    for name in ("fit", "score_site", "write", "Run"):
        monkeypatch.setattr(commands, name, refuse)
    monkeypatch.setattr(comparison, "score_sites", refuse)


def complaint(capsys, *words):
    return complaint_of(capsys, prostate, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare --size 100", "--size is 100; choose a multiple of 16 pixels, at least 32"),
        ("compare --size 16", "--size is 16"),
        ("compare --width 0", "--width is 0; choose at least 1"),
        ("compare --labels 0", "--labels is 0; choose at least 1"),
        ("compare --labels 900", "give at most as many --labels, not 900"),
        ("compare --iterations 0", "--iterations is 0; choose at least 1"),
        ("compare --accumulate 3", "--accumulate is 3, which does not divide --batch-size 4"),
        ("compare --decay 1", "--decay is 1.0; choose at least 0 and less than 1"),
        ("compare --rho -1", "--rho is -1.0; choose a number of at least 0"),
        ("compare --learning-rate nan", "--learning-rate is nan; choose a positive number"),
        ("compare --seeds 0", "--seeds is 0; choose at least 1"),
        ("compare --methods fixmtch", "unknown name 'fixmtch'"),
        ("compare --methods sam,sam", "a method is there twice; name each once"),
        ("compare --methods dim:task:total", "'task' and 'total' exclude each other"),
        ("compare --sites site_a,site_z", "unknown name 'site_z'; choose from site_a"),
        ("compare --sites site_b", "--sites leaves out the labelled site_a"),
        ("compare --labelled site_a,site_b", "more than one name"),
        ("compare --data-root /nowhere", "/nowhere is not a folder"),
        ("compare --device tpu", "--device: device 'tpu' is not available"),
        ("compare --threads 0", "--threads is 0; choose at least 1"),
        ("compare --out /proc/nowhere", "cannot be written to"),
        ("train --seed -1", "--seed is -1"),
        ("train --method dim:js:kl", "exclude each other"),
        ("evaluate", "evaluate needs --checkpoint"),
        ("evaluate --checkpoint /nowhere.pt", "there is no such checkpoint"),
        ("export --size 8", "--size is 8; choose at least 16 pixels"),
        ("export --out /proc", "is not empty; choose a new folder"),
        ("adapt", "there is no command 'adapt'"),
    ],
)
@pytest.mark.usefixtures("nothing_is_computed")
def test_bad_input_is_one_line(capsys, words, message):
    small = words.startswith("compare") and "--size" not in words
    extra = ["--size", "32", "--train-images", "15"] if small else []
    extra += ["--labels", "6"] if small and "--labels" not in words else []
    if small and "--sites" not in words and "--labelled" not in words:
        extra += [] if "--data-root" in words else SITES
    assert message in complaint(capsys, *words.split(), *extra)


@pytest.mark.usefixtures("nothing_is_computed")
def test_bad_data_are_one_line(exported, tmp_path, capsys):
    root = tmp_path / "data"
    root.symlink_to(exported)
    path = exported / "site_b" / "test" / "mask" / "01_03.png"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:60])
        text = complaint(capsys, "compare", *TINY, "--data-root", root, "--out", tmp_path / "out")
    finally:
        path.write_bytes(content)
    assert "site_b/test/mask/01_03.png cannot be decoded" in text
    assert not (tmp_path / "out").exists()
