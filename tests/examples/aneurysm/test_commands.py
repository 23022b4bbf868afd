"""The commands: what they write, and that bad input ends with one line and status 2."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.aneurysm import comparison, tested
from examples.aneurysm.__main__ import main
from examples.common.nifti import Volume, read, write

TINY = [
    "--volumes", 2, "--size", 16, "--patch", 16, "--width", 2, "--iterations", 2,
    "--validations", 1, "--learning-rate", 0.01,
]  # fmt: skip
METHODS = "none,ema,bacl"


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module", autouse=True)
def few_latents():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "LATENT_PATCHES", 3)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    words = ["compare", *TINY, "--methods", METHODS, "--seeds", 2, "--held-out", "centre_d"]
    assert run(*words, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "data"
    words = ["--volumes", 2, "--size", 16, "--centres", "centre_a,centre_c", "--out", out]
    assert run("export", *words) == 0
    return out


def results_of(out):
    return json.loads((out / "results.json").read_text())


def test_results_follow_the_schema(compared):
    results = results_of(compared)
    assert [(r["method"], r["seed"]) for r in results] == [
        (method, seed) for seed in (0, 1) for method in METHODS.split(",")
    ]
    for result in results:
        assert list(result)[:8] == ["method", "centre", "seed", "n", "dsc", "sen", "jac", "vs"]
        assert result["centre"] == "centre_d"
        assert result["n"] == len(result["cases"]) == 2
        mean = sum(case["dsc"] for case in result["cases"]) / 2
        assert result["dsc"] == pytest.approx(mean)
        assert 0 <= result["vs"] <= 100


def test_table_and_figures(compared):
    table = (compared / "table.md").read_text()
    assert all(f"| {method} |" in table for method in METHODS.split(","))
    for name in ("projections.png", "latents.png", "gate.png"):
        with Image.open(compared / name) as picture:
            assert min(picture.size) > 300
            colours = picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)
        assert len(colours) > 20


def test_a_finished_comparison_is_read_again(compared, tmp_path, monkeypatch, capsys):
    before = results_of(compared)
    words = ["compare", *TINY, "--methods", METHODS, "--seeds", 2, "--held-out", "centre_d"]
    assert run(*words, "--out", compared) == 2
    assert "holds a training; go on with the same command and --resume" in capsys.readouterr().err
    pictures = {name: (compared / name).read_bytes() for name in ("projections.png", "gate.png")}
    monkeypatch.setattr(tested, "score_volumes", None)  # no volume is segmented again
    assert run(*words, "--out", compared, "--resume") == 0
    assert results_of(compared) == before
    for name, content in pictures.items():
        assert (compared / name).read_bytes() == content


def test_training_evaluating_and_resuming_on_a_folder(exported, tmp_path, capsys):
    out = tmp_path / "trained"
    words = ["train", *TINY, "--data-root", exported, "--held-out", "centre_c", "--out", out]
    assert run(*words, "--method", "bacl", "--tensorboard") == 0
    (curves,) = (out / "tensorboard").iterdir()
    written = curves.read_bytes()
    for tag in (b"source", b"target", b"contrast", b"dsc"):
        assert written.count(tag) == 1
    assert run(*words, "--method", "bacl") == 2
    assert run(*words, "--method", "bacl", "--resume") == 0
    scores = tmp_path / "scores"
    words = ["evaluate", "--checkpoint", out / "best.pt", "--data-root", exported, "--save"]
    assert run(*words, "--out", scores) == 0
    (result,) = results_of(scores)
    assert result["centre"] == "centre_c"
    assert result["n"] == 2
    labels = sorted((scores / "labels").iterdir())
    assert [path.name for path in labels] == [
        f"centre_c_{k:03}_image_label.nii.gz" for k in range(2)
    ]
    for path, case in zip(labels, result["cases"], strict=True):
        original = read(exported / case["case"])
        np.testing.assert_allclose(read(path).affine, original.affine, rtol=1e-6)
        predicted = read(path).voxels == 2
        actual = read(exported / case["case"].replace("_image", "_label")).voxels == 2
        size = predicted.sum() + actual.sum()
        expected = 200 * (predicted & actual).sum() / size if size else 100
        assert case["dsc"] == pytest.approx(expected)
    capsys.readouterr()


def test_an_interrupted_comparison_tells_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "fit", interrupted)
    assert run("compare", *TINY, "--methods", "none", "--out", tmp_path) == 130
    assert capsys.readouterr().err.strip().endswith("go on with the same command and --resume")


COMPARE = ["compare", *TINY]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*COMPARE, "--methods", "gsem"], "unknown name 'gsem'.*did you mean gsema"),
        ([*COMPARE, "--held-out", "centre_e"], "unknown name 'centre_e'"),
        ([*COMPARE, "--seeds", 0], "--seeds is 0"),
        ([*COMPARE, "--iterations", 0], "--iterations is 0"),
        ([*COMPARE, "--validations", 3], "--validations is 3; choose at most"),
        ([*COMPARE, "--patch", 20], "--patch is 20; choose a multiple of 8"),
        ([*COMPARE, "--network", "swin", "--width", 8], "--width is 8; the swin network"),
        ([*COMPARE, "--network", "resnet"], "choose from unet, swin"),
        ([*COMPARE, "--learning-rate", "nan"], "--learning-rate is nan"),
        ([*COMPARE, "--volumes", 1], "--volumes is 1"),
        ([*COMPARE, "--preset", "code", "--methods", "bacl-v"], "no weight for bacl-v"),
        ([*COMPARE, "--methods", "none", "--teacher", "supervised"], "no effect on none; choose"),
        ([*COMPARE, "--resume", "--overwrite"], "choose one"),
        ([*COMPARE, "--data-root", "missing"], "missing is not a folder"),
        ([*COMPARE, "--device", "tpu9"], "--device"),
        (["train", "--resume"], "no training to resume"),
        (["train", "--method", "none,ema"], "more than one name"),
        (["train", "--seed", -1], "--seed is -1"),
        (["evaluate", "--checkpoint", "missing.pt"], "no such checkpoint"),
        (["export", "--size", 8], "--size is 8"),
        (["export", "--centres", "centre_z"], "unknown name 'centre_z'"),
    ],
)
def test_bad_options_end_with_one_line(words, message, tmp_path, capsys):
    words = [str(word) for word in words]
    try:
        status = main([*words, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()


def spoil_label(root):
    path = root / "centre_c" / "000_label.nii.gz"
    label = read(path)
    write(path, Volume(label.voxels + np.uint8(5), label.affine))


def drop_file(root):
    (root / "centre_c" / "001_image.nii.gz").unlink()


def one_centre(root):
    rows = json.loads((root / "datalist.json").read_text())["training"]
    (root / "datalist.json").write_text(json.dumps({"training": rows[:2]}))


def one_volume(root):
    rows = json.loads((root / "datalist.json").read_text())["training"]
    (root / "datalist.json").write_text(json.dumps({"training": rows[:3]}))


def in_two_centres(root):
    """The second volume of the held-out centre is a copy of a source's first."""
    for kind in ("image", "label"):
        copied = root / "centre_c" / f"000_{kind}.nii.gz"
        shutil.copy(copied, root / "centre_a" / f"001_{kind}.nii.gz")


def no_aneurysm(root):
    for path in (root / "centre_c").glob("*_label.nii.gz"):
        label = read(path)
        write(path, Volume(np.minimum(label.voxels, 1).astype("u1"), label.affine))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_label, "000_label.nii.gz has the unknown label"),
        (drop_file, "001_image.nii.gz does not exist"),
        (one_centre, "only the centre 'centre_a'"),
        (one_volume, "centre_c has 1 volume"),
        (in_two_centres, "are the same volume"),
        (no_aneurysm, "but those of centre_a, which is held out, shows an aneurysm (label 2)"),
    ],
)
def test_bad_data_end_with_one_line_before_anything_is_written(
    exported, spoil, message, tmp_path, capsys
):
    root = tmp_path / "data"
    shutil.copytree(exported, root)
    spoil(root)
    out = tmp_path / "out"
    words = ["train", *TINY, "--data-root", root, "--held-out", "centre_a", "--out", out]
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not out.exists()


def test_the_centre_held_out_needs_no_labels_and_a_single_volume(exported, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(exported, root)
    rows = json.loads((root / "datalist.json").read_text())["training"]
    del rows[2]["label"]
    (root / "datalist.json").write_text(json.dumps({"training": rows[:3]}))
    out = tmp_path / "out"
    words = [*TINY, "--data-root", root, "--held-out", "centre_c"]
    assert run("compare", *words, "--methods", "none", "--out", out) == 2
    assert "volume 3 of" in capsys.readouterr().err
    assert run("train", *words, "--method", "none", "--out", out) == 0
    words = ["--checkpoint", out / "best.pt", "--data-root", root, "--save", "--out", out / "new"]
    assert run("evaluate", *words) == 0
    (result,) = results_of(out / "new")
    assert result["n"] == 0
    assert result["dsc"] is None
    assert result["cases"] == [{"case": "centre_c/000_image.nii.gz"}]
    (label,) = (out / "new" / "labels").iterdir()
    assert read(label).voxels.shape == (16, 16, 16)
    assert "| centre_c | 0 | - |" in capsys.readouterr().out


def test_aneurysms_that_resampling_loses_are_told(exported, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(exported, root)
    path = root / "centre_c" / "000_label.nii.gz"
    label = read(path)
    voxels = np.minimum(label.voxels, 1).astype("u1")
    voxels[0, 0, 0] = 2
    write(path, Volume(voxels, label.affine))
    # Voxels half as long along one axis: every second one of the others is left out.
    for name in ("000_image", "000_label"):
        path = root / "centre_c" / f"{name}.nii.gz"
        found = read(path)
        write(path, Volume(found.voxels, found.affine @ np.diag([4.0, 1, 1, 1])))
    words = ["train", *TINY, "--data-root", root, "--held-out", "centre_a", "--method", "none"]
    assert run(*words, "--out", tmp_path / "out") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("at size 16 the aneurysm of 1 of 4 volume(s), first centre_c/000_image")


def test_other_numbers_of_iterations_are_named(tmp_path, capsys):
    words = ["train", *TINY, "--method", "none", "--out", tmp_path]
    assert run(*words) == 0
    assert run(*words, "--resume", "--iterations", 4) == 2
    assert "iterations per validation 2, not 4" in capsys.readouterr().err


def test_the_published_network_trains(tmp_path):
    """The two-stage Swin U-Net with checkpointing, as an option of any method."""
    words = ["train", *TINY, "--network", "swin", "--width", 6, "--checkpointing"]
    assert run(*words, "--method", "gsema", "--preset", "code", "--out", tmp_path) == 0
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert content["architecture"]["network"] == "swin"
    assert Path(tmp_path / "last.pt").exists()
