"""Training of the source model: supervised, at one centre.

After the source training of Chen et al. (https://arxiv.org/abs/2408.07343): binary cross-entropy
plus soft Dice, SGD with Nesterov momentum, a learning rate that falls polynomially once per epoch.
Theirs starts from ImageNet weights and takes 200 epochs at 512² with learning rate 1e-3, momentum
0.99 and weight decay 5e-4, on all images of the source, and keeps the last epoch. The defaults
here train from scratch in a few epochs at 128²: a learning rate 200 times as large with momentum
0.9 (momentum 0.99 averages over 100 steps, of which a short training has few more), on the
source's train list only, of which a fifth is held out to choose the best epoch.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import gradkit as gk
from examples.common.checkpoint import load
from examples.common.datasets import Sample, fingerprint, length, split_held_out
from examples.common.losses import segmentation_loss
from examples.common.scores import mean_scores, score_cases
from examples.common.training import (
    LAST,
    Entry,
    Training,
    check_settings,
    polynomial_learning_rate,
    restore,
    train,
)
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.sample import DICE, STRUCTURES
from examples.fundus.source_model import Architecture, describe, read_architecture

Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainingSettings:
    """Hyper-parameters of a source training; GraTa's values are above.

    Attributes:
        epochs: passes over the training images.
        seed: of weights, split, order and augmentation.
        batch_size: images per step (8 is GraTa's).
        learning_rate: of the first epoch.
        momentum: Nesterov's.
        weight_decay: L2 penalty (5e-4 is GraTa's).
        amp: half precision in the forward pass; None: on a GPU only.
    """

    epochs: int = 20
    seed: int = 0
    batch_size: int = 8
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    amp: bool | None = None


def evaluate(
    model: torch.nn.Module, samples: Dataset[Sample], device: torch.device
) -> dict[str, float]:
    """Mean Dice (%) of disc and cup over samples, one image at a time, without adaptation.

    The model is put in evaluation mode.
    """
    return mean_scores(score_cases(model, samples, device, DICE))


def select(entry: Entry) -> float:
    """Mean of disc and cup Dice, %, by which the best epoch is chosen."""
    return sum(entry[name] for name in STRUCTURES) / len(STRUCTURES)


def train_source(
    samples: Dataset[Sample],
    architecture: Architecture,
    settings: TrainingSettings,
    directory: Path,
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[Entry], None] | None = None,
    on_resume: Callable[[], None] | None = None,
    root: str = "folder",
) -> Path:
    """Trains a source model and returns the path of its best epoch's checkpoint.

    Writes `last.pt` (everything needed to go on) and `best.pt` (weights of the epoch with the
    highest held-out score, the earliest among equals) after every epoch. Every random number is a
    function of (seed, epoch, index), so a training that was interrupted and resumed ends with the
    same bits as one that was not.

    A training of fewer epochs is extended: further epochs take the learning rates that they have
    in a training of `settings.epochs`. The epochs before keep those of the shorter schedule, so
    that the result differs from a training that was as long from the start, unless only the first
    epoch was done, whose learning rate is the same in both. Extended, interrupted and resumed
    again it does end with the same bits.

    Args:
        samples: the source's train list.
        architecture: of the model; `size` is the side of the samples.
        settings: hyper-parameters.
        directory: where the checkpoints go; made if missing.
        device: where to compute.
        resume: go on from `last.pt` if there is one; otherwise start anew.
        progress: show progress on standard error.
        on_epoch: called after each epoch's checkpoints are written.
        on_resume: called once an earlier training is restored, before it goes on.
        root: kind of data root that the samples are from, `synthetic` or `folder`; a training is
            resumed on the same data only.

    Raises:
        CheckpointError: `last.pt` is unreadable or belongs to another training, such as one of
            more epochs.
        TrainingError: `last.pt` belongs to other data, or the loss is no longer finite.
        ValueError: there are fewer than two samples.
    """
    training = make_training(samples, architecture, settings, device, root)
    description = f"train {architecture.source}" if progress else None
    return start_or_resume(
        training, architecture, directory, description, resume, on_epoch, on_resume
    )


def start_or_resume(
    training: Training[Batch],
    architecture: Architecture,
    directory: Path,
    description: str | None,
    resume: bool,
    on_epoch: Callable[[Entry], None] | None,
    on_resume: Callable[[], None] | None,
) -> Path:
    """Trains to the end and returns the path of the best epoch's checkpoint.

    Args:
        training: before its first epoch.
        architecture: of the network that it trains, or of which it trains a part.
        directory: where the checkpoints go; made if missing.
        description: what lines of progress begin with; None shows none.
        resume: go on from `last.pt` if there is one; otherwise start anew.
        on_epoch: called after each epoch's checkpoints are written.
        on_resume: called once an earlier training is restored, before it goes on.

    Raises:
        CheckpointError: `last.pt` is unreadable or belongs to another training.
        TrainingError: `last.pt` belongs to other data, or the loss is no longer finite.
    """
    last = directory / LAST
    if resume and last.exists():
        found = read_architecture(last, load(last))
        check_settings(last, asdict(found), asdict(architecture))
        restore(training, last)
        if on_resume is not None:
            on_resume()
    return train(training, directory, description, on_epoch)


def make_training(
    samples: Dataset[Sample],
    architecture: Architecture,
    settings: TrainingSettings,
    device: torch.device,
    root: str,
) -> Training[Batch]:
    """A source training before its first epoch; arguments are those of `train_source`."""
    train_indices, held_out_indices = split_held_out(length(samples), settings.seed)
    augmented = AugmentedDataset(Subset(samples, train_indices), settings.seed)
    held_out = Subset(samples, held_out_indices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = architecture.build()
    model.to(device)
    base = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    amp = device.type == "cuda" if settings.amp is None else settings.amp
    scaler = torch.amp.GradScaler(device.type, enabled=amp)

    def objectives(batch: Batch) -> Callable[[], Tensor]:
        image, target = (part.to(device) for part in batch)

        def loss() -> Tensor:
            with torch.autocast(device.type, torch.float16, enabled=amp):
                logits = model(image)
            return segmentation_loss(logits, target)

        return loss

    def batches(epoch: int) -> Iterable[Batch]:
        augmented.epoch = epoch
        # A seed per epoch; multiplied so that neighbouring seeds share no epoch's order.
        order = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        return DataLoader(augmented, settings.batch_size, shuffle=True, generator=order)

    return Training(
        model,
        # Losses that are not finite end the training after the epoch; no step need look for them.
        gk.wrap(base, model=model, nonfinite="ignore", scaler=scaler),
        objectives,
        batches,
        validate=lambda: evaluate(model, held_out, device),
        select=select,
        settings=asdict(settings),
        data=fingerprint(samples, root),
        details=describe(architecture),
        learning_rate=lambda epoch: polynomial_learning_rate(
            settings.learning_rate, epoch, settings.epochs
        ),
        count=lambda batch: len(batch[0]),
    )
