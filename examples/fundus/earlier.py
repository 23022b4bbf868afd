"""What earlier runs have left in a folder of results: it is resumed or replaced on request only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.common.checkpoint import CheckpointError, load
from examples.common.training import ANEW, BEST, LAST, polynomial_learning_rate
from examples.common.usage import UsageError, refuse_to_replace, require
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import load_source_model
from examples.fundus.training import TrainingSettings

EPOCHS = TrainingSettings.epochs
"""Of a training for which no number is given."""


@dataclass(frozen=True)
class EarlierTraining:
    """What `last.pt` tells of its training.

    Attributes:
        source: centre that it trains on.
        done: epochs done.
        epochs: epochs that it was to have.
        learning_rate: of its first epoch.
    """

    source: str
    done: int
    epochs: int
    learning_rate: float

    def __str__(self) -> str:
        state = "finished" if self.done >= self.epochs else "interrupted"
        return f"{state} training of {self.source}, {self.done} of {self.epochs} epochs"


def read_training(last: Path) -> EarlierTraining:
    """Reads how far a training has come.

    Raises:
        CheckpointError: the file is not that of a training, or unreadable.
    """
    content: dict[str, Any] = load(last)
    try:
        settings = content["settings"]
        return EarlierTraining(
            str(content["architecture"]["source"]),
            len(content["history"]),
            int(settings["epochs"]),
            float(settings["learning_rate"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{last}: not a complete state of a training; {ANEW}") from error


def check_earlier(
    out: Path, source: str, epochs: int | None, resume: bool, overwrite: bool, default: int
) -> int:
    """Makes sure that nothing of an earlier run is lost; returns the number of epochs in all.

    Args:
        out: folder of the results.
        source: centre to train on.
        epochs: as asked for; None is as many as the training was to have, or `default`.
        resume: whether to go on with an earlier training.
        overwrite: whether to replace it.
        default: epochs of a new training for which no number is given.

    Raises:
        UsageError: there is nothing to resume, or something that would be replaced.
        CheckpointError: what is to be resumed cannot be read.
    """
    require(
        not (resume and overwrite),
        "--resume continues the training in --out, --overwrite replaces it; choose one",
    )
    if resume:
        return check_resumption(out, epochs)
    if not overwrite:
        refuse_to_replace_training(out, source)
    return default if epochs is None else epochs


def check_resumption(out: Path, epochs: int | None) -> int:
    """How many epochs a resumed training has in all.

    Args:
        out: folder of the results.
        epochs: as asked for; None is as many as the training was to have.

    Raises:
        UsageError: there is nothing to resume, or it was to have more epochs.
        CheckpointError: what is there cannot be read.
    """
    last = out / "training" / LAST
    require(
        last.exists(),
        f"there is no training to resume: {last} is missing; check --out, or leave --resume out",
    )
    earlier = read_training(last)
    require(
        epochs is None or epochs >= earlier.epochs,
        f"--epochs is {epochs}, but the training in {last.parent} is of {earlier.epochs}, of which "
        f"{earlier.done} are done; give {earlier.epochs} or, to extend it, more",
    )
    return earlier.epochs if epochs is None else epochs


def resumption_note(last: Path, epochs: int) -> str:
    """What resuming a training with this many epochs in all does, in one line."""
    earlier = read_training(last)
    if earlier.done >= epochs:
        return (
            f"{earlier.source} is trained: all {epochs} epochs are done; more --epochs extend the "
            "training"
        )
    text = f"resuming {earlier.source} after epoch {earlier.done}"
    if epochs == earlier.epochs:
        return f"{text} of {epochs}"
    old, new = (
        polynomial_learning_rate(earlier.learning_rate, epoch, total)
        for epoch, total in ((earlier.done - 1, earlier.epochs), (earlier.done, epochs))
    )
    note = (
        f"{text}: extended from {earlier.epochs} to {epochs} epochs, whose learning rates are from "
        f"now on those of a training of {epochs} ({old:.3g} in epoch {earlier.done}, {new:.3g} in "
        f"epoch {earlier.done + 1})"
    )
    if earlier.done > 1:  # the first epoch's learning rate is the same in all schedules
        note += "; the result differs from that of a training of as many from the start"
    return note


def refuse_to_replace_training(out: Path, source: str) -> None:
    """Makes sure that a new training replaces no earlier one.

    Raises:
        UsageError: the folder holds a training, of whatever centre, or the centre's model.
    """
    folder, model = out / "training", out / f"{source}.pt"
    remedy = "choose another --out, or replace it with --overwrite"
    last = folder / LAST
    if last.exists():
        try:
            earlier = read_training(last)
        except CheckpointError:
            raise UsageError(f"{folder} holds a training that cannot be read; {remedy}") from None
        if earlier.source == source:
            more = "extend it by --resume with more --epochs"
            going_on = more if earlier.done >= earlier.epochs else "continue it with --resume"
            remedy = f"{going_on}, {remedy}"
        raise UsageError(f"{folder} holds a {earlier}; {remedy}")
    refuse_to_replace([model, folder / BEST])


def refuse_to_replace_model(path: Path, model: ResUNet34) -> None:
    """Makes sure that a model that is to be written to a path replaces no other one.

    Raises:
        UsageError: there is a file, and it does not hold the same numbers.
    """
    try:
        there, here = load_source_model(path)[0].state_dict(), model.state_dict()
    except CheckpointError:
        refuse_to_replace([path])  # unreadable, or none
        return
    same = there.keys() == here.keys() and all(
        torch.equal(there[name], here[name]) for name in here
    )
    if not same:
        refuse_to_replace([path])
