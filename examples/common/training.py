"""A training loop whose step is `optimizer.step(objectives(batch))`.

What a method does to gradients lies in the optimizer, which `gk.wrap` makes, and what it minimises
in the objectives. The loop knows neither, so that every method is an argument of the same training.

An epoch is what lies between two validations: a pass over the data, or a number of batches. After
each one the whole state is written, so that a training that was interrupted goes on from its last
whole epoch and ends with the same bits.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from examples.common.checkpoint import CheckpointError, load, save_atomically
from examples.common.datasets import Fingerprint
from examples.common.progress import Progress
from gradkit import GradientOptimizer

ANEW = "start anew, in another --out or with --overwrite"
LAST, BEST = "last.pt", "best.pt"
"""A training's files: all that it needs to go on, and the weights of its best epoch."""

Batch = TypeVar("Batch")
Objectives: TypeAlias = Callable[[], Any] | Mapping[str, Callable[[], Any]]
Entry: TypeAlias = dict[str, float]
"""What an epoch came to: its number from 1 as `epoch`, mean losses, and scores."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message is one line with the remedy."""


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, a scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Takes over what `state_dict` returned."""
        ...


@dataclass
class Training(Generic[Batch]):
    """A training between two epochs: what it consists of, and how far it has come.

    It is resumed bit for bit if all random numbers are a function of the epoch or drawn from
    `generators`.

    Attributes:
        model: the network, which is in training mode during an epoch.
        optimizer: made by `gk.wrap`, for float16 with `scaler=`.
        objectives: of a batch, what `optimizer.step` takes: a closure or several by name. To
            accumulate gradients, a closure is a generator function that yields the loss of each
            micro-batch. Autocast belongs into the closures.
        batches: of an epoch, which is counted from 0.
        validate: the scores of an epoch that is done, in percent where `shown`.
        select: what is highest for the best epoch, of which the earliest among equals is kept.
        settings: plain values that a training has in common with those it may continue: a training
            of fewer `epochs`, the one value that must be there, is extended.
        data: what it trains on, which must be the same, too.
        details: further plain values in its files, such as the network's architecture.
        learning_rate: of an epoch counted from 0, for schedules that are a function of the epoch;
            an extended training takes those of the longer schedule.
        scheduler: any other schedule; it steps after each batch.
        extra: by name, what else changes and must be kept: a mean teacher that the optimizer's
            state does not hold, or a critic and its optimizer.
        generators: by name; those of torch itself are `default_generators`.
        count: of a batch, its weight in mean losses, such as the number of its images.
        shown: whether progress shows a score, by its name.
        patience: after how many epochs without a better one the training ends early; None: never.
        kept: names of parts in `extra` that the best epoch's file holds, too.
        history: an entry for each epoch that is done.
        extensions: for each time that it got more epochs, how many were `done` and how many
            `epochs` it was to have before.
    """

    model: nn.Module
    optimizer: GradientOptimizer
    objectives: Callable[[Batch], Objectives]
    batches: Callable[[int], Iterable[Batch]]
    validate: Callable[[], Mapping[str, float]]
    select: Callable[[Entry], float]
    settings: Mapping[str, Any]
    data: Fingerprint
    details: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: Callable[[int], float] | None = None
    scheduler: LRScheduler | None = None
    extra: Mapping[str, Stateful] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    count: Callable[[Batch], int] = lambda batch: 1
    shown: Callable[[str], bool] = lambda name: True
    patience: int | None = None
    kept: Collection[str] = ()
    history: list[Entry] = field(default_factory=list)
    extensions: list[dict[str, int]] = field(default_factory=list)


def train(
    training: Training[Batch],
    directory: Path,
    description: str | None = None,
    on_epoch: Callable[[Entry], None] | None = None,
    writes: bool = True,
    unit: str = "epoch",
) -> Path:
    """Trains for the epochs that are left, and returns the path of the best one's checkpoint.

    After every epoch it writes `last.pt` and, where the epoch is the best so far, `best.pt`.

    Args:
        training: new, or as `restore` has left it.
        directory: where the checkpoints go; made if missing.
        description: what lines of progress begin with; None shows none.
        on_epoch: called after each epoch's checkpoints are written.
        writes: whether this process writes them; of several ranks that train together, one does.
        unit: what lines of progress call an epoch.

    Raises:
        TrainingError: a loss is no longer finite.
        ValueError: an objective and a score have the same name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done, epochs = len(training.history), training.settings["epochs"]
    with Progress(epochs, description, unit, initial=done, every_round=True) as shown:
        for epoch in range(done, epochs):
            if is_exhausted(training.history, training.select, training.patience):
                break
            losses = run_epoch(training, epoch)
            scores = training.validate()
            entry = {"epoch": epoch + 1, **losses, **scores}
            if len(entry) < 1 + len(losses) + len(scores):
                raise ValueError(
                    f"losses {', '.join(losses)} and scores {', '.join(scores)} share a name, or "
                    "one is named epoch; rename objectives"
                )
            value = training.select(entry)
            is_best = all(value > training.select(earlier) for earlier in training.history)
            training.history.append(entry)
            # The best first: if the run dies between the two files, the epoch is run again.
            if is_best and writes:
                save(training, directory / BEST, complete=False)
            if writes:
                save(training, directory / LAST, complete=True)
            notes = [f"{name}={value:.3f}" for name, value in losses.items()]
            notes += [
                f"{name}={value:.1f}%" for name, value in scores.items() if training.shown(name)
            ]
            shown.update(", ".join(notes))
            if on_epoch is not None:
                on_epoch(entry)
    return directory / BEST


def is_exhausted(
    history: Sequence[Entry], select: Callable[[Entry], float], patience: int | None
) -> bool:
    """Whether the best epoch lies `patience` epochs back; never where that is None.

    Example:
        >>> history = [{"dice": 80.0}, {"dice": 90.0}, {"dice": 85.0}]
        >>> [is_exhausted(history, lambda entry: entry["dice"], patience) for patience in (1, 2)]
        [True, False]
    """
    if patience is None or not history:
        return False
    values = [select(entry) for entry in history]
    return len(values) - 1 - values.index(max(values)) >= patience


def run_epoch(training: Training[Batch], epoch: int) -> dict[str, float]:
    """Trains for one epoch, counted from 0, and returns the mean loss of each objective.

    Raises:
        TrainingError: one of them is not finite.
    """
    optimizer = training.optimizer
    if training.learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(epoch)
    training.model.train()
    totals: dict[str, torch.Tensor] = {}  # on the device, which nothing waits for
    weights: dict[str, int] = {}
    for batch in training.batches(epoch):
        optimizer.step(training.objectives(batch))
        if training.scheduler is not None:
            training.scheduler.step()
        step, count = optimizer.last_step, training.count(batch)
        assert step is not None  # there is a record after every step
        for name, loss in zip(step.names, step.losses, strict=True):
            totals[name] = totals.get(name, torch.zeros_like(loss)) + loss * count
            weights[name] = weights.get(name, 0) + count
    means = {name: total.item() / weights[name] for name, total in totals.items()}
    for name, value in means.items():
        if not math.isfinite(value):
            of = "" if name == "loss" else f" of {name}"  # a closure without a name is "loss"
            raise TrainingError(
                f"the loss{of} is {value} in epoch {epoch + 1}; lower the training's learning rate "
                f"({optimizer.defaults['lr']})"
            )
    return means


def save(training: Training[Any], path: Path, complete: bool) -> None:
    """Writes the weights, and where `complete` what a resumed training needs besides."""
    content: dict[str, Any] = {
        **training.details,
        "model": training.model.state_dict(),
        "settings": dict(training.settings),
        "history": training.history,
        "extensions": training.extensions,
    }
    for name in training.kept:
        content[name] = training.extra[name].state_dict()
    if complete:
        scaler = training.optimizer.scaler
        content["data"] = asdict(training.data)
        content["optimizer"] = training.optimizer.state_dict()
        content["scaler"] = {} if scaler is None else scaler.state_dict()
        for name, part in _stateful(training).items():
            content[name] = part.state_dict()
        if training.generators:
            content["generators"] = {
                name: generator.get_state() for name, generator in training.generators.items()
            }
    save_atomically(content, path)


def restore(training: Training[Any], path: Path) -> None:
    """Continues from a complete checkpoint, of as many epochs or fewer.

    Raises:
        CheckpointError: it is unreadable, incomplete, or of other settings or more epochs.
        TrainingError: it is of other data.
    """
    content = load(path)
    settings = content.get("settings")
    found = settings if isinstance(settings, dict) else {}
    check_settings(path, found, training.settings)
    scaler = training.optimizer.scaler
    try:
        data = Fingerprint(**content["data"])
        training.model.load_state_dict(content["model"])
        # A teacher before the optimizer, whose state tells whether it is the one that was saved.
        for name, part in _stateful(training).items():
            part.load_state_dict(content[name])
        training.optimizer.load_state_dict(content["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(content["scaler"])
        for name, generator in training.generators.items():
            generator.set_state(content["generators"][name])
        training.history = [dict(entry) for entry in content["history"]]
        training.extensions = [dict(extension) for extension in content.get("extensions", [])]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a complete state of a training; {ANEW}") from error
    if data != training.data:
        raise TrainingError(
            f"{path}: belongs to a training on other data ({data}), not on these "
            f"({training.data}); give the same images in the same order, or {ANEW}"
        )
    # Epoch 1 has the same learning rate in a training of any length.
    done, epochs = len(training.history), found["epochs"]
    if epochs < training.settings["epochs"] and done > 1:
        training.extensions.append({"done": done, "epochs": epochs})


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Makes sure that a checkpoint is of the training that is to be continued.

    Args:
        path: of the checkpoint, for messages.
        found: what it tells of its training.
        wanted: what it must tell, but for `epochs`, of which it may have fewer.

    Raises:
        CheckpointError: a value is another.
    """
    for name, value in wanted.items():
        other = found.get(name)
        extended = name == "epochs" and isinstance(other, int) and other < value
        if other != value and not extended:
            raise CheckpointError(
                f"{path}: belongs to a training with {name} {other}, not {value}; "
                f"repeat that value, or {ANEW}"
            )


def polynomial_learning_rate(base: float, epoch: int, epochs: int, power: float = 0.9) -> float:
    """The learning rate base·(1 − epoch/epochs)^power of an epoch counted from 0.

    Example:
        >>> polynomial_learning_rate(0.1, 0, 10)
        0.1
    """
    return base * math.pow(1 - epoch / epochs, power)


def default_generators(device: torch.device) -> dict[str, torch.Generator]:
    """The generators that torch draws from where it is given none, as dropout does.

    Example:
        >>> list(default_generators(torch.device("cpu")))
        ['cpu']
    """
    generators = {"cpu": torch.default_generator}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators["cuda"] = torch.cuda.default_generators[index]
    return generators


def _stateful(training: Training[Any]) -> dict[str, Stateful]:
    scheduler = training.scheduler
    return {**({} if scheduler is None else {"scheduler": scheduler}), **training.extra}
