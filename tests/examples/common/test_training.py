"""The loop: its step is the optimizer's, and an interrupted training ends with the same bits."""

import math

import pytest
import torch
from contents import assert_equal_content
from torch import nn

import gradkit as gk
from examples.common.checkpoint import CheckpointError, load, save_atomically
from examples.common.datasets import Fingerprint
from examples.common.training import (
    Training,
    TrainingError,
    default_generators,
    polynomial_learning_rate,
    restore,
    run_epoch,
    train,
)

CPU = torch.device("cpu")
DATA = Fingerprint("synthetic", 12, "0" * 64)
LENGTH = 3  # batches of an epoch


def batch_of(epoch, number, dimensions=2):
    """Images and targets, which the epoch and the number determine."""
    generator = torch.Generator().manual_seed(100 * epoch + number)
    images = torch.randn(4, 1, *dimensions * [4], generator=generator)
    return images, (images > 0).float()


def make(
    *transforms,
    epochs=4,
    objectives=None,
    dimensions=2,
    amp=False,
    schedule=False,
    seed=0,
    dropout=0.0,
    lr=0.1,
    **options,
):
    """A small training, the same for the same arguments."""
    torch.manual_seed(seed)
    convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
    norm = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm3d
    layers = [convolution(1, 3, 3, padding=1), norm(3), nn.Tanh(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers, convolution(3, 1, 1))
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5, enabled=amp)
    optimizer = gk.wrap(base, *transforms, model=model, scaler=scaler, nonfinite="ignore")

    def loss_of(batch):
        images, targets = batch

        def loss():
            with torch.autocast("cpu", torch.float16, enabled=amp):
                logits = model(images)
            return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)

        return loss

    def validate():
        model.eval()
        images, targets = batch_of(99, 0, dimensions)
        with torch.no_grad():
            right = ((model(images) > 0) == (targets > 0)).float().mean()
        return {"accuracy": 100 * right.item()}

    settings = {"epochs": epochs, "seed": seed}
    return Training(
        model,
        optimizer,
        loss_of if objectives is None else lambda batch: objectives(model, batch),
        lambda epoch: (batch_of(epoch, number, dimensions) for number in range(LENGTH)),
        validate,
        lambda entry: entry["accuracy"],
        settings,
        DATA,
        scheduler=torch.optim.lr_scheduler.StepLR(base, 4, 0.5) if schedule else None,
        **options,
    )


def both(model, batch):
    """Two objectives, which disagree."""
    images, targets = batch
    return {
        "fit": lambda: (model(images) - targets).square().mean(),
        "small": lambda: model(images).abs().mean(),
    }


def in_parts(model, batch):
    """The loss of both halves of a batch, one after the other."""
    images, targets = batch
    for half in (slice(0, 2), slice(2, 4)):
        yield (model(images[half]) - targets[half]).square().mean() / 2


def test_the_step_is_the_optimizers(tmp_path):
    training, own = make(), make()
    train(training, tmp_path)
    history = []
    for epoch in range(4):
        own.model.train()
        total = torch.zeros(())
        for number in range(LENGTH):
            own.optimizer.base.zero_grad()
            loss = own.objectives(batch_of(epoch, number))()
            loss.backward()
            own.optimizer.base.step()
            total += loss.detach()
        history.append({"epoch": epoch + 1, "loss": total.item() / LENGTH, **own.validate()})
    assert_equal_content(training.model.state_dict(), own.model.state_dict())
    assert training.history == history
    assert load(tmp_path / "last.pt")["history"] == history


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dimensions": 3},
        {"schedule": True},
        {"amp": True},
        {"objectives": both},
        {"dropout": 0.5, "generators": default_generators(CPU)},
        {"learning_rate": lambda epoch: 0.1 / (1 + epoch)},
        {"objectives": lambda model, batch: lambda: in_parts(model, batch)},
    ],
    ids=["plain", "volumes", "scheduler", "amp", "two", "dropout", "rate", "parts"],
)
@pytest.mark.parametrize("within", [True, False], ids=["within an epoch", "after an epoch"])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, options, within):
    def transforms():
        return (gk.PCGrad(), gk.SAM()) if options.get("objectives") is both else (gk.SAM(),)

    def interrupt(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    whole = make(*transforms(), **options)
    train(whole, tmp_path / "whole")

    parts = make(*transforms(), **options)
    if within:
        original = parts.batches

        def interrupted(epoch):
            for number, batch in enumerate(original(epoch)):
                if (epoch, number) == (2, 1):
                    raise KeyboardInterrupt
                yield batch

        parts.batches = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(parts, tmp_path / "parts", on_epoch=None if within else interrupt)
    assert len(load(tmp_path / "parts" / "last.pt")["history"]) == 2

    resumed = make(*transforms(), **options)
    torch.manual_seed(99)  # whatever the state of the global generator
    restore(resumed, tmp_path / "parts" / "last.pt")
    entries = []
    train(resumed, tmp_path / "parts", on_epoch=entries.append)
    assert [entry["epoch"] for entry in entries] == [3, 4]
    for name in ("last.pt", "best.pt"):
        assert_equal_content(load(tmp_path / "parts" / name), load(tmp_path / "whole" / name))


def test_losses_are_named_after_objectives(tmp_path, capsys):
    training = make(gk.PCGrad(), objectives=both, epochs=1)
    train(training, tmp_path, "here")
    (entry,) = training.history
    assert list(entry) == ["epoch", "fit", "small", "accuracy"]
    line = capsys.readouterr().err
    assert line.startswith(
        f"here: epoch 1 of 1, fit={entry['fit']:.3f}, small={entry['small']:.3f}, accuracy="
    )


def test_batches_count_by_their_size():
    def one_value(model, batch):
        return lambda: batch * sum(p.sum() for p in model.parameters()).square()

    training = make(objectives=one_value, lr=0.0, count=lambda batch: 1 if batch < 2 else 3)
    training.batches = lambda epoch: [torch.tensor(value) for value in (1.0, 2.0)]
    value = one_value(training.model, 1.0)().item()
    assert run_epoch(training, 0)["loss"] == pytest.approx(value * (1 + 3 * 2) / 4, rel=1e-6)


def test_a_generator_accumulates_to_the_step_of_the_whole_batch(tmp_path):
    def whole(model, batch):
        images, targets = batch
        return lambda: (model(images) - targets).square().mean()

    def frozen(**options):
        training = make(**options)
        training.model[1].eval()  # the statistics of a part are not those of the whole
        training.model.train = lambda mode=True: training.model
        return training

    parts = frozen(objectives=lambda model, batch: lambda: in_parts(model, batch))
    expected = frozen(objectives=whole)
    losses = [run_epoch(training, 0)["loss"] for training in (parts, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(parts.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_scales_losses(tmp_path):
    training = make(amp=True)
    train(training, tmp_path)
    # 12 steps without an overflow, and the scale grows every 5
    assert load(tmp_path / "last.pt")["scaler"]["scale"] == 16.0
    assert load_weight(tmp_path / "last.pt").dtype == torch.float32
    train(make(), tmp_path / "single")
    single = load_weight(tmp_path / "single" / "last.pt")
    assert not torch.equal(load_weight(tmp_path / "last.pt"), single)


def load_weight(path):
    return load(path)["model"]["0.weight"]


def test_the_scheduler_steps_after_each_batch(tmp_path):
    training = make(schedule=True, epochs=2)
    train(training, tmp_path)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5)  # 6 steps of 4
    assert load(tmp_path / "last.pt")["scheduler"]["last_epoch"] == 2 * LENGTH


def test_the_learning_rate_of_an_epoch_is_set_before_it():
    training = make(learning_rate=lambda epoch: 0.5**epoch)
    for epoch in (0, 3):
        run_epoch(training, epoch)
        assert training.optimizer.param_groups[0]["lr"] == 0.5**epoch


def test_what_else_changes_is_kept(tmp_path):
    critics = [nn.Linear(2, 1) for _ in range(2)]
    train(make(extra={"critic": critics[0]}), tmp_path)
    restore(make(extra={"critic": critics[1]}), tmp_path / "last.pt")
    assert torch.equal(critics[0].weight, critics[1].weight)
    with pytest.raises(CheckpointError, match="not a complete state of a training"):
        restore(make(extra={"other": critics[1]}), tmp_path / "last.pt")


@pytest.mark.parametrize("in_state", [True, False])
def test_a_mean_teacher_is_kept(tmp_path, in_state):
    def taught(epochs):
        training = make(epochs=epochs)
        teacher = gk.EMA(training.model, decay=0.9, in_state=in_state)
        training.optimizer = gk.wrap(training.optimizer.base, teacher, model=training.model)
        training.extra = {} if in_state else {"teacher": teacher.teacher}
        return training, teacher

    whole, expected = taught(4)
    train(whole, tmp_path / "whole")
    first, _ = taught(2)
    train(first, tmp_path / "parts")
    second, teacher = taught(4)
    restore(second, tmp_path / "parts" / "last.pt")
    train(second, tmp_path / "parts")
    assert_equal_content(teacher.teacher.state_dict(), expected.teacher.state_dict())


def test_the_earliest_of_the_best_epochs_is_kept(tmp_path):
    training = make()
    scores = iter([50.0, 70.0, 70.0, 60.0])
    training.validate = lambda: {"accuracy": next(scores)}
    best = train(training, tmp_path)
    assert [entry["epoch"] for entry in load(best)["history"]] == [1, 2]
    assert set(load(best)) == {"model", "settings", "history", "extensions"}


def test_details_are_in_both_files(tmp_path):
    best = train(make(details={"format": "mine 1"}), tmp_path)
    assert load(best)["format"] == load(tmp_path / "last.pt")["format"] == "mine 1"


def test_more_epochs_extend_a_training(tmp_path):
    train(make(epochs=2), tmp_path)
    longer = make(epochs=4)
    restore(longer, tmp_path / "last.pt")
    train(longer, tmp_path)
    assert [entry["epoch"] for entry in longer.history] == [1, 2, 3, 4]
    assert load(tmp_path / "last.pt")["extensions"] == [{"done": 2, "epochs": 2}]
    with pytest.raises(CheckpointError, match="with epochs 4, not 3"):
        restore(make(epochs=3), tmp_path / "last.pt")


def test_another_training_is_not_continued(tmp_path):
    train(make(), tmp_path)
    last = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match="seed 0, not 1; repeat that value, or start anew"):
        restore(make(seed=1), last)
    other = make()
    other.data = Fingerprint("folder", 3, "1" * 64)
    with pytest.raises(TrainingError, match=r"on other data \(synthetic, 12 image"):
        restore(other, last)
    content = load(last)
    for name in ("data", "model", "optimizer", "history"):
        save_atomically({key: value for key, value in content.items() if key != name}, last)
        with pytest.raises(CheckpointError, match="not a complete state of a training"):
            restore(make(), last)
    save_atomically({}, last)
    with pytest.raises(CheckpointError, match="epochs None, not 4"):
        restore(make(), last)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (lambda model, batch: lambda: model(batch[0]).sum() * math.nan, "the loss is nan in"),
        (
            lambda model, batch: (
                both(model, batch) | {"small": lambda: model(batch[0]).mean() + math.inf}
            ),
            "the loss of small is inf in",
        ),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, objectives, message):
    training = make(objectives=objectives)
    with pytest.raises(TrainingError, match=rf"{message} epoch 1; lower .* \(0\.1\)"):
        train(training, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_do_not_clash(tmp_path):
    training = make()
    training.validate = lambda: {"loss": 1.0}
    with pytest.raises(ValueError, match="losses loss and scores loss share a name"):
        train(training, tmp_path)


def test_learning_rate_falls_to_a_tenth_of_an_epoch():
    assert polynomial_learning_rate(1e-3, 0, 200) == 1e-3
    assert polynomial_learning_rate(1e-3, 100, 200) == pytest.approx(1e-3 * 0.5**0.9)
    assert polynomial_learning_rate(1e-3, 199, 200) == pytest.approx(1e-3 * 0.005**0.9)


# Ending early, and what is kept and shown


def with_scores(scores, **options):
    """A training whose epochs come to these accuracies."""
    training = make(epochs=len(scores), **options)
    left = list(scores)
    training.validate = lambda: {"accuracy": left.pop(0), "other": 0.5}
    return training


@pytest.mark.parametrize(("patience", "done"), [(None, 6), (1, 3), (2, 6), (9, 6)])
def test_patience_ends_a_training(tmp_path, patience, done):
    training = with_scores([1.0, 3.0, 2.0, 4.0, 4.0, 3.0], patience=patience)
    train(training, tmp_path)
    assert len(training.history) == done
    again = with_scores([1.0, 3.0, 2.0, 4.0, 4.0, 3.0], patience=patience)
    restore(again, tmp_path / "last.pt")
    train(again, tmp_path)  # which is over already
    assert len(again.history) == done


def test_the_best_file_holds_the_parts_that_are_to_be_kept(tmp_path):
    teacher, critic = nn.Linear(1, 1), nn.Linear(2, 1)
    extra = {"teacher": teacher, "critic": critic}
    train(make(extra=extra, kept=("teacher",)), tmp_path)
    best, last = load(tmp_path / "best.pt"), load(tmp_path / "last.pt")
    assert_equal_content(dict(best["teacher"]), dict(teacher.state_dict()))
    assert "critic" not in best
    assert {"teacher", "critic"} <= last.keys()


def test_progress_shows_the_scores_that_it_is_to_show(tmp_path, capsys):
    train(with_scores([1.0], shown=lambda name: name == "accuracy"), tmp_path, "t")
    line = capsys.readouterr().err
    assert "accuracy=1.0%" in line
    assert "other" not in line
    assert load(tmp_path / "last.pt")["history"][0]["other"] == 0.5


def test_a_rank_that_does_not_write_trains_all_the_same(tmp_path):
    silent, loud = make(epochs=2), make(epochs=2)
    train(silent, tmp_path / "silent", writes=False)
    train(loud, tmp_path / "loud")
    assert list((tmp_path / "silent").iterdir()) == []
    assert silent.history == loud.history
    assert_equal_content(silent.model.state_dict(), loud.model.state_dict())
