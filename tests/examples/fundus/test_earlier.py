"""What an earlier run has left in --out is lost or mixed up on request only."""

from dataclasses import asdict

import pytest
import torch

from examples.common import training as common_training
from examples.common.adaptation import Stream
from examples.common.checkpoint import load, save_atomically
from examples.fundus import commands, comparison
from examples.fundus.__main__ import main
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, save_source_model
from examples.fundus.training import TrainingSettings

TINY = ["--size", "64", "--width", "2", "--train-images", "4"]
COMMANDS = {"train": [*TINY], "compare": [*TINY, "--target-images", "1"]}


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("computed before everything was checked")

    monkeypatch.setattr(commands, "train_source", refuse)
    for name in ("adapt_online", "evaluate"):
        monkeypatch.setattr(comparison, name, refuse)


def run(*words):
    return main([str(word) for word in words])


def complaint(capsys, *words):
    capsys.readouterr()
    assert run(*words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def leave(out, done, epochs, source="centre_a", finished=None):
    """Puts what a training leaves into a folder, without any training."""
    architecture = Architecture(2, 64, source)
    weights = ResUNet34(2).state_dict()
    details = {
        "settings": asdict(TrainingSettings(epochs)),
        "history": [{"epoch": n + 1, "loss": 1.0, "disc": 50.0, "cup": 50.0} for n in range(done)],
    }
    (out / "training").mkdir(parents=True)
    for name in ("last.pt", "best.pt"):
        save_source_model(out / "training" / name, architecture, weights, **details)
    if done >= epochs if finished is None else finished:
        save_source_model(out / f"{source}.pt", architecture, weights)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"done": 3, "epochs": 3}, "holds a finished training of centre_a, 3 of 3 epochs; extend"),
        ({"done": 2, "epochs": 9}, "an interrupted training of centre_a, 2 of 9 epochs; continue"),
        ({"done": 3, "epochs": 3, "source": "centre_e"}, "training of centre_e, 3 of 3 epochs; ch"),
    ],
)
def test_a_training_is_not_replaced_unasked(
    capsys, tmp_path, nothing_is_computed, command, left, message
):
    leave(tmp_path, **left)
    before = contents(tmp_path)
    text = complaint(capsys, command, *COMMANDS[command], "--out", tmp_path)
    assert message.replace("an interrupted", "interrupted") in text
    assert ("--resume" in text) == (left.get("source") is None)
    assert "choose another --out, or replace it with --overwrite" in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["centre_a.pt", "training/best.pt", "training/last.pt"])
def test_a_file_of_a_training_is_not_replaced_unasked(
    capsys, tmp_path, nothing_is_computed, command, name
):
    (tmp_path / "training").mkdir()
    (tmp_path / name).write_text("unreadable")
    text = complaint(capsys, command, *COMMANDS[command], "--out", tmp_path)
    assert "choose another --out, or replace it with --overwrite" in text
    assert (tmp_path / name).read_text() == "unreadable"


def test_another_centres_model_is_not_in_the_way(tmp_path, monkeypatch):
    save_source_model(tmp_path / "centre_b.pt", Architecture(2, 64, "centre_b"), {})
    monkeypatch.setattr(commands.Train, "fit", lambda self, epochs: None)
    assert run("train", *TINY, "--out", tmp_path) == 0


def test_overwrite_trains_anew(tmp_path, monkeypatch):
    leave(tmp_path, done=3, epochs=3)
    new = tmp_path / "new.pt"
    save_source_model(new, Architecture(2, 64, "centre_a"), ResUNet34(2).state_dict())

    def anew(samples, architecture, settings, directory, device, resume, **options):
        assert not resume
        return new

    monkeypatch.setattr(commands, "train_source", anew)
    assert run("train", *TINY, "--out", tmp_path, "--overwrite") == 0
    trained, kept = (load(path)["model"] for path in (new, tmp_path / "centre_a.pt"))
    assert all(torch.equal(trained[name], kept[name]) for name in trained)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_to_resume(capsys, tmp_path, nothing_is_computed, command):
    out = tmp_path / "out"
    words = [command, *COMMANDS[command], "--resume", "--out"]
    text = complaint(capsys, *words, out)
    assert f"there is no training to resume: {out / 'training' / 'last.pt'} is missing" in text
    assert not out.exists()
    # a model alone does not tell how its training goes on
    save_source_model(tmp_path / "centre_a.pt", Architecture(2, 64, "centre_a"), {})
    assert "no training to resume" in complaint(capsys, *words, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_resume_and_overwrite_exclude_each_other(capsys, tmp_path, nothing_is_computed, command):
    leave(tmp_path, done=1, epochs=2)
    words = [command, *COMMANDS[command], "--resume", "--overwrite", "--out", tmp_path]
    assert "choose one" in complaint(capsys, *words)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("done", [2, 3])
def test_a_training_is_not_shortened(capsys, tmp_path, nothing_is_computed, command, done):
    leave(tmp_path, done=done, epochs=3)
    before = contents(tmp_path)
    words = [command, *COMMANDS[command], "--resume", "--epochs", 2, "--out", tmp_path]
    text = complaint(capsys, *words)
    assert f"--epochs is 2, but the training in {tmp_path / 'training'} is of 3, of which" in text
    assert f"{done} are done; give 3 or, to extend it, more" in text
    assert contents(tmp_path) == before


def test_what_is_resumed_is_said(capsys, tmp_path, monkeypatch):
    epochs = []

    def resumed(samples, architecture, settings, directory, *rest, **options):
        epochs.append(settings.epochs)
        options["on_resume"]()
        return directory / "best.pt"

    monkeypatch.setattr(commands, "train_source", resumed)
    words = ["train", *TINY, "--resume", "--out"]
    leave(tmp_path / "interrupted", done=2, epochs=9)
    assert run(*words, tmp_path / "interrupted") == 0
    assert capsys.readouterr().err == "resuming centre_a after epoch 2 of 9\n"
    leave(tmp_path / "finished", done=3, epochs=3)
    for more in ([], ["--epochs", 3]):
        assert run(*words, tmp_path / "finished", *more) == 0
        note = "centre_a is trained: all 3 epochs are done; more --epochs extend the training\n"
        assert capsys.readouterr().err == note
    assert run(*words, tmp_path / "finished", "--epochs", 5) == 0
    note = capsys.readouterr().err
    assert note.startswith("resuming centre_a after epoch 3: extended from 3 to 5 epochs, whose")
    # 0.2·(1/3)^0.9 and 0.2·(2/5)^0.9
    assert "(0.0744 in epoch 3, 0.0877 in epoch 4); the result differs from that of" in note
    leave(tmp_path / "first", done=1, epochs=1)
    assert run(*words, tmp_path / "first", "--epochs", 5) == 0
    assert capsys.readouterr().err.endswith("(0.2 in epoch 1, 0.164 in epoch 2)\n")
    assert epochs == [9, 3, 3, 5, 5]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", 1, "seed 0, not 1"),
        ("--width", 4, "width 2, not 4"),
        ("--learning-rate", 0.1, "learning_rate 0.2, not 0.1"),
        ("--source", "centre_b", "source centre_a, not centre_b"),
    ],
)
def test_another_training_is_not_resumed(capsys, tmp_path, option, value, message):
    leave(tmp_path, done=2, epochs=9)
    before = contents(tmp_path)
    text = complaint(capsys, "train", *TINY, "--resume", option, value, "--out", tmp_path)
    assert f"belongs to a training with {message}; repeat that value, or start anew" in text
    assert contents(tmp_path) == before


def test_extending_really_trains_on(tmp_path, monkeypatch):
    words = ["train", *TINY, "--train-images", 2, "--out", tmp_path]
    assert run(*words, "--epochs", 1) == 0
    assert run(*words, "--epochs", 2, "--resume") == 0
    last = load(tmp_path / "training" / "last.pt")
    assert (len(last["history"]), last["settings"]["epochs"]) == (2, 2)
    monkeypatch.setattr(common_training, "run_epoch", None)  # no further epoch
    assert run(*words, "--resume") == 0


def test_a_state_without_its_parts_is_not_resumed(capsys, tmp_path, nothing_is_computed):
    (tmp_path / "training").mkdir()
    save_atomically({"settings": {}}, tmp_path / "training" / "last.pt")
    text = complaint(capsys, "train", *TINY, "--resume", "--out", tmp_path)
    assert "not a complete state of a training; start anew, in another --out" in text
    assert "holds a training that cannot be read" in complaint(
        capsys, "train", *TINY, "--out", tmp_path
    )


# A comparison by a given checkpoint


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The words of a comparison by a checkpoint that adapts nothing, and its folder."""
    monkeypatch.setattr(comparison.Compare, "_adapt", lambda self, *arguments: None)
    model = tmp_path / "given.pt"
    save_source_model(model, Architecture(2, 64, "centre_a"), ResUNet34(2).state_dict())
    out = tmp_path / "out"
    out.mkdir()
    words = ["compare", *COMMANDS["compare"], "--checkpoint", model, "--out", out]
    return words, model, out / "centre_a.pt"


def test_a_given_checkpoint_replaces_no_other_model_unasked(capsys, given):
    words, model, kept = given
    for content in (b"unreadable", model.read_bytes()[:-1000]):
        kept.write_bytes(content)
        assert f"{kept} is there from an earlier run" in complaint(capsys, *words)
        assert kept.read_bytes() == content
    save_source_model(kept, Architecture(2, 64, "centre_a"), ResUNet34(2).state_dict())
    before = kept.read_bytes()
    assert "replace it with --overwrite" in complaint(capsys, *words)
    assert kept.read_bytes() == before
    assert run(*words, "--overwrite") == 0
    weights, expected = load(kept)["model"], load(model)["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert run(*words) == 0  # the same numbers: nothing is lost


def test_a_given_checkpoint_has_no_training_to_resume(capsys, given):
    words, _, _ = given
    assert "leave one of them out" in complaint(capsys, *words, "--resume")


# Results


def test_replaced_results_are_said(capsys, tmp_path, monkeypatch):
    model = tmp_path / "given.pt"
    save_source_model(model, Architecture(2, 64, "centre_a"), ResUNet34(2).state_dict())
    monkeypatch.setattr(commands, "adapt_online", lambda *arguments, **options: Stream())
    monkeypatch.setattr(commands, "save_masks", lambda *arguments: None)
    monkeypatch.setattr(commands, "markdown_table", lambda *arguments: "table")
    monkeypatch.setattr(commands, "write_json", lambda results, path, *rest: path.write_text("new"))
    out = tmp_path / "out"
    words = ["adapt", "--checkpoint", model, "--target-images", 1, "--out", out]
    assert run(*words) == 0
    assert capsys.readouterr().err == ""
    assert run(*words) == 0
    assert capsys.readouterr().err == f"the results of an earlier run in {out} are replaced\n"
