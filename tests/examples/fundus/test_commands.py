import csv
import json

import numpy as np
import pytest
import torch
from children import run_python
from helpers import complaint_of
from PIL import Image

from examples.common import adaptation
from examples.common import training as common_training
from examples.common.bootstrap import bootstrap_interval
from examples.common.checkpoint import load
from examples.fundus import commands, comparison, training
from examples.fundus.__main__ import main
from examples.fundus.data import open_domain
from examples.fundus.fusion import load_cup_ratio
from examples.fundus.gate import measure_cup_ratio
from examples.fundus.methods import BY_DEFAULT

TINY = ["--size", "64", "--width", "2", "--epochs", "1", "--train-images", "4"]
FEW = ["--target-images", "2"]
CPU = torch.device("cpu")


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One comparison of all methods on synthetic data, trained from scratch."""
    out = tmp_path_factory.mktemp("compared")
    words = ["compare", *TINY, *FEW, "--targets", "centre_b,centre_e", "--lr", "0.01"]
    assert run(*words, "--seed", 5, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def checkpoint(compared):
    return compared / "centre_a.pt"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported") / "data"
    words = ["--domains", "centre_a,centre_c", "--count", 6, "--size", 64, "--out", root]
    assert run("export", *words) == 0
    return root


def read(out):
    return json.loads((out / "results.json").read_text())


# What the commands write


def test_results_follow_the_schema(compared):
    results = read(compared)
    assert [(r["target"], r["method"]) for r in results] == [
        (target, method) for target in ("centre_b", "centre_e") for method in BY_DEFAULT
    ]
    for result in results:
        assert list(result) == [
            "source", "target", "method", "statistics", "lr", "seed",
            "n", "disc", "cup", "mean", "images",
        ]  # fmt: skip
        assert result["source"] == "centre_a"
        assert result["statistics"] == ("source" if result["method"] == "none" else "test")
        assert result["lr"] == (0.01 if result["method"] in ("tent", "grata") else None)
        assert result["seed"] == 5
        assert result["n"] == len(result["images"]) == 2
        for image in result["images"]:
            assert list(image) == ["image", "disc", "cup"]
        for name in ("disc", "cup"):
            scores = [image[name] for image in result["images"]]
            assert all(0 <= score <= 100 for score in scores)
            assert result[name] == pytest.approx(sum(scores) / 2, rel=1e-12)
        assert result["mean"] == pytest.approx((result["disc"] + result["cup"]) / 2, rel=1e-12)


def test_the_source_model_tells_the_ratio_of_its_labels(checkpoint):
    labels = open_domain("synthetic", "centre_a", "train", 64, 5, 4)
    assert load_cup_ratio(checkpoint) == measure_cup_ratio(labels)


def test_images_come_in_list_order(compared):
    names = [image["image"] for image in read(compared)[0]["images"]]
    assert names == [
        open_domain("synthetic", "centre_b", "all", 64, 5, 2)[i].name for i in range(2)
    ]


def test_table_has_a_row_for_each_pair_and_method(compared, capsys):
    table = (compared / "table.md").read_text()
    for result in read(compared):
        means = [(image["disc"] + image["cup"]) / 2 for image in result["images"]]
        low, high = bootstrap_interval(means, seed=5)
        row = f"| {result['target']} | {result['method']} | {result['statistics']} |"
        (line,) = [line for line in table.splitlines() if row in line]
        assert f"{result['mean']:.2f} [{low:.2f}, {high:.2f}] |" in line
    assert sum("average over targets" in line for line in table.splitlines()) == len(BY_DEFAULT)
    assert "| centre_a | centre_a (in domain) | none | source | - | 2 |" in table


def test_average_row_is_the_mean_over_targets(compared):
    results = [r for r in read(compared) if r["method"] == "grata"]
    mean = sum(r["mean"] for r in results) / 2
    table = (compared / "table.md").read_text()
    (line,) = [x for x in table.splitlines() if "average" in x and "grata" in x]
    assert line.endswith(f"| {mean:.2f} |")


def test_figures_are_pictures(compared):
    for name in ("figure.png", "alignment.png"):
        with Image.open(compared / name) as picture:
            assert min(picture.size) > 300
            colours = picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)
        assert len(colours) > 50


def test_a_given_checkpoint_repeats_the_comparison(compared, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "train_source", None)  # nothing is trained
    words = ["compare", *TINY, *FEW, "--targets", "centre_e", "--lr", "0.01", "--seed", 5]
    assert run(*words, "--checkpoint", checkpoint, "--out", tmp_path) == 0
    assert read(tmp_path) == read(compared)[len(BY_DEFAULT) :]
    again, first = load(tmp_path / "centre_a.pt")["model"], load(checkpoint)["model"]
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("method", BY_DEFAULT)
def test_adapt_gives_the_scores_of_compare_and_the_masks(compared, checkpoint, tmp_path, method):
    words = ["adapt", "--checkpoint", checkpoint, "--target", "centre_b", "--method", method]
    assert run(*words, *FEW, "--lr", 0.01, "--seed", 5, "--out", tmp_path) == 0
    assert read(tmp_path) == [read(compared)[BY_DEFAULT.index(method)]]
    dataset = open_domain("synthetic", "centre_b", "all", 64, 5, 2)
    for index, scores in enumerate(read(tmp_path)[0]["images"]):
        path = tmp_path / "masks" / "centre_b" / method / scores["image"]
        assert cup_score(path, dataset[index]) == pytest.approx(scores["cup"], abs=1e-3)


# Target images without masks


def listing(root, rows):
    """A centre with one list of these lines, in place of centre_c's two."""
    (root / "centre_c_train.csv").unlink()
    (root / "centre_c_test.csv").unlink()
    (root / "centre_c.csv").write_text("\n".join(rows) + "\n")


def unmask(root, kind):
    """Takes the masks of centre_c, or all but the second one, out of lists or folders."""
    lists = [(root / f"centre_c_{half}.csv").read_text().split() for half in ("train", "test")]
    rows = [row.split(",") for row in lists[0][1:] + lists[1][1:]]
    if kind == "no column":
        listing(root, ["image", *(image for image, _ in rows)])
    elif kind == "empty cells":
        listing(root, ["image,mask", *(f"{image}," for image, _ in rows)])
    elif kind == "short rows":
        listing(root, ["image,mask", *(image for image, _ in rows)])
    elif kind == "some cells":
        named = ["", rows[1][1], "", "", "", ""]
        pairs = zip(rows, named, strict=True)
        listing(root, ["image,mask", *(f"{image},{mask}" for (image, _), mask in pairs)])
    else:
        for number, (_, mask) in enumerate(rows):
            if kind == "no files" or number != 1:
                (root / mask).unlink()


@pytest.mark.parametrize(
    ("kind", "scored"),
    [
        ("no column", 0),
        ("empty cells", 0),
        ("short rows", 0),
        ("no files", 0),
        ("some cells", 1),
        ("some files", 1),
    ],
)
def test_images_without_masks_are_predicted_and_not_scored(
    exported, checkpoint, tmp_path, capsys, kind, scored
):
    root = copy_tree(exported, tmp_path / "data")
    unmask(root, kind)
    words = ["adapt", "--checkpoint", checkpoint, "--target", "centre_c", "--method", "tent"]
    words += ["--missing-masks"] * kind.endswith("files")
    assert run(*words, "--data-root", exported, "--out", tmp_path / "whole") == 0
    whole = read(tmp_path / "whole")[0]
    capsys.readouterr()
    assert run(*words, "--data-root", root, "--out", tmp_path / "out") == 0
    result, table = read(tmp_path / "out")[0], capsys.readouterr().out
    expected = [
        image if scored and number == 1 else {"image": image["image"]}
        for number, image in enumerate(whole["images"])
    ]
    assert result["images"] == expected
    assert result["n"] == scored
    (row,) = [line for line in table.splitlines() if line.startswith("| centre_a")]
    assert ("Dice in %" in table) == (scored > 0)
    if scored:
        assert {name: result[name] for name in ("disc", "cup")} == {
            name: expected[1][name] for name in ("disc", "cup")
        }
        assert row.endswith(f"| 1 | {result['disc']:.2f} | {result['cup']:.2f} "
                            f"| {result['mean']:.2f} [-] |")  # fmt: skip
        assert "Scored: 1 of 6 images; the others have no mask." in table
    else:
        assert (result["disc"], result["cup"], result["mean"]) == (None, None, None)
        assert row.endswith("| 0 | - | - | - |")
        assert "No scores: none of the 6 images has a mask." in table
    folders = [tmp_path / name / "masks" / "centre_c" for name in ("whole", "out")]
    files = [sorted(folder.rglob("*.png")) for folder in folders]
    assert len(files[0]) == len(files[1]) == 6
    for one, other in zip(*files, strict=True):  # labels have no part in what is predicted
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_a_table_of_scored_images_speaks_of_no_masks(exported, checkpoint, tmp_path, capsys):
    words = ["adapt", "--checkpoint", checkpoint, "--target", "centre_c", "--method", "none"]
    words += ["--missing-masks", "--data-root", exported]
    assert run(*words, "--out", tmp_path) == 0
    assert "mask" not in capsys.readouterr().out


def test_a_named_mask_must_be_there_unless_the_user_says_so(
    capsys, exported, checkpoint, tmp_path, nothing_is_computed
):
    root = copy_tree(exported, tmp_path / "data")
    _, row = (root / "centre_c_test.csv").read_text().split()[:2]
    mask = root / row.split(",")[1]
    mask.unlink()
    words = ["adapt", "--checkpoint", checkpoint, "--target", "centre_c", "--data-root", root]
    words += ["--out", tmp_path / "out"]
    message = complaint(capsys, *words)
    assert f"{mask} does not exist, which row 1 of {root / 'centre_c_test.csv'} names" in message
    assert "restore the file, leave its cell empty, or pass --missing-masks" in message
    mask.write_text("no picture")  # there, but broken
    assert f"{mask} cannot be decoded" in complaint(capsys, *words, "--missing-masks")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["no column", "empty cells", "no files"])
def test_heads_need_no_masks(exported, checkpoint, tmp_path, monkeypatch, kind):
    root = copy_tree(exported, tmp_path / "data")
    unmask(root, kind)
    larger = tmp_path / "larger.pt"  # heads need images of 128 pixels
    content = load(checkpoint)
    told = {"size": 128, "source": "centre_c"}
    torch.save(content | {"architecture": content["architecture"] | told}, larger)
    seen = []

    def stop(samples, *arguments, **options):
        seen.extend(samples[index].has_labels for index in range(len(samples)))
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train_heads", stop)
    words = ["heads", "--checkpoint", larger, "--data-root", root, "--out", tmp_path / "out"]
    assert run(*words) == 130
    assert seen
    assert not any(seen)


def test_a_column_of_masks_of_another_name_is_told(
    capsys, exported, checkpoint, tmp_path, nothing_is_computed
):
    root = copy_tree(exported, tmp_path / "data")
    lists = [root / f"centre_c_{half}.csv" for half in ("train", "test")]
    for path in lists:
        path.write_text(path.read_text().replace("image,mask", "image,label"))
    words = ["adapt", "--checkpoint", checkpoint, "--target", "centre_c", "--data-root", root]
    message = complaint(capsys, *words, "--missing-masks", "--out", tmp_path / "out")
    assert f"{lists[0]} has no column 'mask', but 'label' names files such as" in message
    assert "call the masks' column mask" in message


@pytest.mark.parametrize("kind", ["no column", "empty cells", "no files"])
def test_compare_needs_masks(capsys, exported, tmp_path, nothing_is_computed, kind):
    root = copy_tree(exported, tmp_path / "data")
    unmask(root, kind)
    words = ["compare", "--data-root", root, "--targets", "centre_c", "--out", tmp_path / "out"]
    assert {
        "no column": f"{root / 'centre_c.csv'} has no column 'mask'",
        "empty cells": "fill in both columns, image and mask (only `adapt` and `heads` take",
        "no files": "does not exist; restore the file, or correct the list that names it",
    }[kind] in complaint(capsys, *words)


def cup_score(path, sample):
    """Dice (%) of the cup of a mask on disk."""
    with Image.open(path) as picture:
        assert picture.mode == "L"
        mask = np.array(picture)
    assert set(np.unique(mask)) <= {0, 128, 255}
    truth = sample.target[1].numpy() > 0
    return 200 * ((mask == 0) & truth).sum() / max(1, (mask == 0).sum() + truth.sum())


def test_images_of_alike_names_each_have_their_mask(exported, checkpoint, tmp_path):
    root = copy_tree(exported, tmp_path / "data")
    table = root / "centre_c_train.csv"
    _, *rows = csv.reader(table.read_text().splitlines())
    for (image, _), name in zip(rows, ("0.png", "0.JPG", "0.JPG.png"), strict=True):
        Image.open(root / image).save(root / name)
    names = ["0.png", "./0.JPG", "0.JPG.png", "0.png"]
    masks = [rows[i][1] for i in (0, 1, 2, 0)]
    lines = [("image", "mask"), *zip(names, masks, strict=True)]
    table.write_text("\n".join(map(",".join, lines)))
    (root / "centre_c_test.csv").write_text(",".join(lines[0]) + "\n" + ",".join(lines[1]))
    words = ["adapt", "--checkpoint", checkpoint, "--data-root", root, "--target", "centre_c"]
    assert run(*words, "--method", "tent", "--lr", 0.05, "--out", tmp_path / "out") == 0
    dataset = open_domain(root, "centre_c", "all", 64)
    images = read(tmp_path / "out")[0]["images"]
    assert [scores["image"] for scores in images] == [*names, "0.png"]
    written = ["0.png", "0.JPG.png.png", "0.JPG.png", "0.png.png", "0.png.png.png"]
    folder = tmp_path / "out" / "masks" / "centre_c" / "tent"
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)
    for index, (name, scores) in enumerate(zip(written, images, strict=True)):
        assert cup_score(folder / name, dataset[index]) == pytest.approx(scores["cup"], abs=1e-3)


def test_results_of_an_earlier_comparison_do_not_stay(compared, checkpoint, tmp_path):
    out = copy_tree(compared, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (out / "holiday.png").write_text("mine")
    words = ["compare", *TINY, *FEW, "--targets", "centre_e", "--methods", "none"]
    assert run(*words, "--checkpoint", checkpoint, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "centre_a.pt", "figure.png", "holiday.png", "notes.txt", "results.json", "table.md",
        "training",
    ]  # fmt: skip
    words = ["adapt", "--checkpoint", checkpoint, "--method", "none", *FEW]
    assert run(*words, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "centre_a.pt", "holiday.png", "masks", "notes.txt", "results.json", "training",
    ]  # fmt: skip


def test_masks_of_earlier_adaptations_are_told_apart_or_removed(checkpoint, tmp_path):
    def masks():
        found = (tmp_path / "masks").rglob("*.png")
        return sorted(str(path.relative_to(tmp_path / "masks").parent.parent) for path in found)

    words = ["adapt", "--checkpoint", checkpoint, "--method", "none", "--out", tmp_path]
    assert run(*words, "--target", "centre_b", "--target-images", 3) == 0
    assert masks() == 3 * ["centre_b/none/centre_b"]
    (tmp_path / "masks" / "centre_b" / "none" / "notes.txt").write_text("mine")
    assert run(*words, "--target", "centre_e", "--target-images", 1) == 0
    assert masks() == [*3 * ["centre_b/none/centre_b"], "centre_e/none/centre_e"]
    assert run(*words, "--target", "centre_b", "--target-images", 2) == 0
    assert masks() == [*2 * ["centre_b/none/centre_b"], "centre_e/none/centre_e"]
    assert (tmp_path / "masks" / "centre_b" / "none" / "notes.txt").exists()


def test_the_note_on_statistics_is_printed_and_written(checkpoint, tmp_path, capsys):
    words = ["compare", *TINY, "--target-images", 1, "--targets", "centre_b", "--methods"]
    words += ["ptbn,tent", "--checkpoint", checkpoint, "--out", tmp_path]
    assert run(*words, "--statistics", "mixed:0.5") == 0
    for text in (capsys.readouterr().out, (tmp_path / "table.md").read_text()):
        assert text.count("Statistics differ: test for ptbn, mixed:0.5 for tent.") == 1
    assert "differ" not in (tmp_path / "results.json").read_text()


def test_statistics_reach_the_methods_that_learn(checkpoint, tmp_path):
    def scores(method, statistics):
        words = ["adapt", "--checkpoint", checkpoint, "--method", method, *FEW, "--lr", 0]
        assert run(*words, "--statistics", statistics, "--out", tmp_path) == 0
        (result,) = read(tmp_path)
        return result["statistics"], result["images"]

    # with a learning rate of 0 nothing but the statistics is left
    _, source = scores("none", "test")
    _, test = scores("ptbn", "source")
    assert source != test
    for method in ("tent", "grata"):
        assert scores(method, "source") == ("source", source)
        assert scores(method, "test") == ("test", test)
        name, mixed = scores(method, "mixed:0.5")
        assert name == "mixed:0.5"
        assert mixed not in (source, test)
    assert scores("none", "mixed:0.5")[0] == "source"
    assert scores("ptbn", "mixed:0.5")[0] == "test"


def test_train_keeps_the_best_epoch_and_resumes(tmp_path, capsys):
    words = ["train", *TINY, "--out", tmp_path]
    assert run(*words) == 0
    assert str(tmp_path / "centre_a.pt") in capsys.readouterr().out
    content = load(tmp_path / "centre_a.pt")
    assert content["architecture"] == {
        "width": 2, "size": 64, "source": "centre_a", "auxiliary_heads": False,
    }  # fmt: skip
    best = load(tmp_path / "training" / "best.pt")["model"]
    assert all(torch.equal(content["model"][name], best[name]) for name in best)
    assert run(*words, "--resume") == 0
    assert run(*words, "--resume", "--seed", 1) == 2
    assert "seed 0, not 1" in capsys.readouterr().err
    assert run(*words, "--resume", "--train-images", 5) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'training' / 'last.pt'}: belongs to a training on other data" in last
    assert "4 image(s)" in last
    assert "5 image(s)" in last


def test_a_training_on_synthetic_data_is_not_resumed_on_a_folder(exported, tmp_path, capsys):
    words = ["train", "--size", 64, "--width", 2, "--epochs", 1, "--out", tmp_path]
    assert run(*words, "--train-images", 3) == 0
    # the names are the same, for the folder was exported from the synthetic centre
    assert run(*words, "--data-root", exported, "--resume") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "other data (synthetic, 3 image(s)" in last
    assert "not on these (folder, 3 image(s)" in last


def test_real_layout_is_read_and_an_undivided_source_is_trained_on(exported, tmp_path):
    root = tmp_path / "data"
    root.symlink_to(exported)
    words = ["compare", "--data-root", root, "--targets", "centre_c", "--methods", "ptbn"]
    assert run(*words, *TINY, "--out", tmp_path / "a") == 0
    assert [r["n"] for r in read(tmp_path / "a")] == [6]
    assert "in domain" in (tmp_path / "a" / "table.md").read_text()
    root.unlink()
    root.mkdir()
    for name in ("centre_a", "centre_c", "centre_c_train.csv", "centre_c_test.csv"):
        (root / name).symlink_to(exported / name)
    (root / "centre_a.csv").write_text((exported / "centre_a_train.csv").read_text())
    assert run(*words, *TINY, "--out", tmp_path / "b") == 0
    assert "in domain" not in (tmp_path / "b" / "table.md").read_text()


# Bad input: status 2, one line on standard error, nothing computed


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("computed before everything was checked")

    for name in ("train_source", "adapt_online", "export_domains"):
        monkeypatch.setattr(commands, name, refuse)
    for name in ("adapt_online", "evaluate"):
        monkeypatch.setattr(comparison, name, refuse)


def complaint(capsys, *words):
    return complaint_of(capsys, main, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare --epochs 0", "--epochs is 0; choose at least 1"),
        ("compare --size 100", "--size is 100; choose a multiple of 32"),
        ("compare --size 32", "--size is 32; choose a multiple of 32 pixels, at least 64"),
        ("compare --width 3", "--width is 3; choose a positive even number"),
        ("compare --lr -1e-4", "--lr is -0.0001; choose a number of at least 0"),
        ("compare --lr nan", "--lr is nan"),
        ("compare --seed -1", "--seed is -1"),
        ("compare --threads 0", "--threads is 0; choose at least 1"),
        ("compare --train-images 1", "--train-images is 1; choose at least 2"),
        ("compare --target-images 0", "--target-images is 0; choose at least 1"),
        ("compare --statistics mixed:2", "mixed:SHARE with the source's share between 0 and 1"),
        ("compare --methods none,norm", "'norm'; choose from none, ptbn, tent, grata, dua, diga"),
        ("compare --methods none,none", "--methods contains 'none' twice"),
        ("compare --targets centre_b,centre_a", "the source 'centre_a'; choose from centre_b"),
        ("compare --targets centre_b,centre_b", "--targets contains 'centre_b' twice"),
        ("compare --targets centre_z", "'centre_z'; choose from centre_b, centre_c, centre_d"),
        ("compare --targets centre_b,", "--targets contains the unknown name ''"),
        ("compare --source centre_z", "choose from centre_a, centre_b, centre_c"),
        ("compare --source centre_a,centre_b", "more than one name"),
        ("compare --data-root /nowhere/at/all", "/nowhere/at/all is not a folder"),
        ("compare --checkpoint /no/such.pt", "/no/such.pt: there is no such checkpoint"),
        ("compare --device abacus", "--device: device 'abacus' is not available"),
        ("compare --epochs many", "--epochs is 'many'; give a whole number (see python -m "),
        ("adapt", "adapt needs --checkpoint (see python -m examples.fundus adapt --help)"),
        ("adapt --checkpoint /no/such.pt", "/no/such.pt: there is no such checkpoint"),
        ("train --learning-rate 0", "--learning-rate is 0.0; choose a positive number"),
        ("train --batch-size 0", "--batch-size is 0"),
        ("train --source nowhere", "'nowhere'; choose from centre_a"),
        ("export --count 1", "--count is 1; choose at least 2"),
        ("export --size 8", "--size is 8; choose at least 16"),
        ("export --domains centre_a,moon", "'moon'; choose from centre_a"),
        ("evaluate", "there is no command 'evaluate'; choose from compare, train, heads, adapt"),
    ],
)
def test_bad_options(capsys, tmp_path, nothing_is_computed, words, message):
    out = tmp_path / "out"
    command, *options = words.split()
    assert message in complaint(capsys, command, *options, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "heads", "compare", "adapt", "export"])
def test_unwritable_output(capsys, tmp_path, checkpoint, nothing_is_computed, command):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    larger = tmp_path / "larger.pt"  # heads need images of 128 pixels
    content = load(checkpoint)
    torch.save(content | {"architecture": content["architecture"] | {"size": 128}}, larger)
    words = {"adapt": ["--checkpoint", checkpoint], "heads": ["--checkpoint", larger]}
    message = complaint(capsys, command, *words.get(command, []), "--out", blocked / "out")
    assert f"{blocked / 'out'} cannot be written to" in message
    assert "choose another --out" in message


def test_a_checkpoint_tells_size_and_width(exported, checkpoint, tmp_path):
    words = ["compare", "--checkpoint", checkpoint, "--data-root", exported, "--methods", "none"]
    assert run(*words, "--targets", "centre_c", "--target-images", 2, "--out", tmp_path) == 0
    kept = load(tmp_path / "centre_a.pt")["architecture"]
    assert (kept["size"], kept["width"]) == (64, 2)
    words = ["adapt", "--checkpoint", checkpoint, "--data-root", exported, "--method", "none"]
    words += ["--target", "centre_c", "--target-images", 2, "--out", tmp_path / "adapted"]
    assert run(*words) == 0
    assert read(tmp_path / "adapted")[0]["images"] == read(tmp_path)[0]["images"]


def test_other_checkpoints(capsys, tmp_path, checkpoint, nothing_is_computed):
    words = ["compare", "--out", tmp_path / "out", "--checkpoint"]
    wider = complaint(capsys, *words, checkpoint, "--width", 4, "--size", 64)
    assert f"{checkpoint}: trained with width 2, not 4; pass --width 2" in wider
    larger = complaint(capsys, *words, checkpoint, "--width", 2, "--size", 128)
    assert "trained with size 64, not 128" in larger
    elsewhere = complaint(
        capsys, *words, checkpoint, "--width", 2, "--size", 64,
        "--source", "centre_b", "--targets", "centre_c",
    )  # fmt: skip
    assert "trained with source centre_a, not centre_b" in elsewhere
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    assert f"{damaged}: not a readable checkpoint" in complaint(capsys, *words, damaged)
    newer = tmp_path / "newer.pt"
    torch.save(load(checkpoint) | {"architecture": {"width": 2, "depth": 34}}, newer)
    assert f"{newer}: its architecture has the entries" in complaint(capsys, *words, newer)
    words = ["adapt", "--out", tmp_path / "out", "--checkpoint"]
    home = complaint(capsys, *words, checkpoint, "--target", "centre_a")
    assert "--target is centre_a, the checkpoint's own source" in home
    bare = tmp_path / "bare.pt"
    torch.save(load(checkpoint)["model"], bare)
    assert "does not tell its size; pass --size" in complaint(capsys, *words, bare)
    assert "does not tell its source" in complaint(capsys, *words, bare, "--size", 64)
    assert not (tmp_path / "out").exists()


def copy_tree(source, destination):
    for path in sorted(source.rglob("*")):
        copy = destination / path.relative_to(source)
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return destination


@pytest.mark.parametrize(
    "kind",
    [
        "no image",
        "no mask",
        "truncated",
        "column",
        "semicolons",
        "empty",
        "escape",
        "colour mask",
        "lossy mask",
        "sizes",
    ],
)
def test_bad_data(capsys, tmp_path, exported, nothing_is_computed, kind):
    root = copy_tree(exported, tmp_path / "data")
    table = root / "centre_c_test.csv"
    rows = list(csv.reader(table.read_text().splitlines()))
    image, mask = root / rows[-1][0], root / rows[-1][1]
    named = {"no image": image, "truncated": image, "escape": table}.get(kind, mask)
    if kind == "no image":
        image.unlink()
    elif kind == "no mask":
        mask.unlink()
    elif kind == "truncated":
        image.write_bytes(image.read_bytes()[:500])
    elif kind == "colour mask":
        Image.open(mask).convert("RGB").save(mask)
    elif kind == "lossy mask":
        Image.open(mask).save(mask, format="JPEG")
    elif kind == "sizes":
        Image.open(mask).resize((32, 32), Image.Resampling.NEAREST).save(mask)
    else:
        named = table
        rows = {
            "column": [["image", "label"], *rows[1:]],
            "semicolons": [[";".join(row)] for row in rows],
            "empty": rows[:1],
            "escape": [rows[0], ["../../secret.png", rows[1][1]]],
        }[kind]
        table.write_text("\n".join(",".join(row) for row in rows))
    words = ["compare", "--data-root", root, "--targets", "centre_c", "--out", tmp_path / "out"]
    assert str(named) in complaint(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_a_source_of_one_image(capsys, tmp_path, exported):
    root = copy_tree(exported, tmp_path / "data")
    table = root / "centre_a_train.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:2]))
    for command in (["train"], ["compare", "--targets", "centre_c"]):
        words = [*command, "--data-root", root, "--out", tmp_path / "out"]
        assert "centre_a has 1 image to train on" in complaint(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_folder_with_content(capsys, tmp_path, nothing_is_computed):
    (tmp_path / "precious.txt").write_text("")
    message = complaint(capsys, "export", "--out", tmp_path)
    assert f"{tmp_path} is not empty" in message
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_divergence_is_one_line(capsys, tmp_path):
    capsys.readouterr()
    words = ["train", *TINY, "--epochs", 2, "--learning-rate", "1e30", "--out", tmp_path]
    assert run(*words) == 2
    *_, last = capsys.readouterr().err.splitlines()  # after the progress bar
    assert last.startswith("error: the loss is nan in epoch 2; lower the training's learning rate")


# Ctrl-C: status 130, one line


def interrupt_at(monkeypatch, module, name, call):
    """Interrupts the given call of a function, counted from 1, as Ctrl-C does."""
    original, calls = getattr(module, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)


def last_words(capsys, *words):
    """The last line that an interrupted call leaves after its progress bars."""
    capsys.readouterr()
    assert run(*words) == 130
    error = capsys.readouterr().err
    assert "Traceback" not in error
    *_, last, nothing = error.split("\n")  # and not at carriage returns, as bars have them
    assert nothing == ""
    return last


@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_interrupted_training_can_be_continued(capsys, tmp_path, monkeypatch, command):
    words = [command, *TINY, "--epochs", 3, "--out"]
    words[1:1] = ["--targets", "centre_b", "--methods", "none", *FEW] * (command == "compare")
    with monkeypatch.context() as patch:
        interrupt_at(patch, training, "evaluate", 1)
        assert last_words(capsys, *words, tmp_path / "a") == "interrupted"
    with monkeypatch.context() as patch:
        interrupt_at(patch, training, "evaluate", 3)
        assert last_words(capsys, *words, tmp_path / "a") == "interrupted; continue with --resume"
    with monkeypatch.context() as patch:
        # nothing new is kept, but what was kept before is
        interrupt_at(patch, training, "evaluate", 1)
        again = last_words(capsys, *words, tmp_path / "a", "--resume")
        assert again == "interrupted; continue with --resume"
        # of a training that starts anew nothing is kept yet
        assert len(load(tmp_path / "a" / "training" / "last.pt")["history"]) == 2
    with monkeypatch.context() as patch:
        interrupt_at(patch, training, "evaluate", 1)
        assert last_words(capsys, *words, tmp_path / "a", "--overwrite") == "interrupted"
    assert run(*words, tmp_path / "a", "--resume") == 0
    assert run(*words, tmp_path / "b") == 0
    one, other = (load(tmp_path / name / "centre_a.pt")["model"] for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_an_interrupted_comparison_continues_after_its_training(
    capsys, compared, checkpoint, tmp_path, monkeypatch
):
    out = copy_tree(compared, tmp_path / "out")
    words = ["compare", *TINY, *FEW, "--targets", "centre_b", "--methods", "none", "--out", out]
    words += ["--seed", 5]
    with monkeypatch.context() as patch:
        interrupt_at(patch, adaptation, "segment", 2)
        assert last_words(capsys, *words, "--overwrite") == "interrupted; continue with --resume"
    with monkeypatch.context() as patch:
        interrupt_at(patch, adaptation, "segment", 2)
        given = last_words(capsys, *words, "--checkpoint", checkpoint)
        assert given == "interrupted"
    assert read(out) == read(compared)  # the earlier results are still complete
    monkeypatch.setattr(common_training, "run_epoch", None)  # nothing is trained again
    assert run(*words, "--resume") == 0
    assert read(out) == read(compared)[:1]


@pytest.mark.parametrize("command", ["adapt", "export"])
def test_interrupted_without_a_way_to_continue(capsys, checkpoint, tmp_path, monkeypatch, command):
    if command == "adapt":
        interrupt_at(monkeypatch, adaptation, "segment", 1)
        words = ["--checkpoint", checkpoint, *FEW]
    else:
        interrupt_at(monkeypatch, commands, "export_domains", 1)
        words = []
    assert last_words(capsys, command, *words, "--out", tmp_path) == "interrupted"


def test_module_is_a_program(tmp_path):
    words = ["compare", "--epochs", "0", "--out", tmp_path]
    done = run_python("-m", "examples.fundus", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --epochs is 0; choose at least 1\n"


@pytest.mark.parametrize("command", ["train", "heads", "adapt", "compare", "export"])
def test_help_shows_defaults_and_units(capsys, command):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "pixels" in text
    assert "(default: 0)" in text
