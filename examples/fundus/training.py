"""Training of the source model: supervised, at one centre.

After the source training of Chen et al. (https://arxiv.org/abs/2408.07343): binary cross-entropy
plus soft Dice, SGD with Nesterov momentum, a learning rate that falls polynomially once per epoch.
Theirs starts from ImageNet weights and takes 200 epochs at 512² with learning rate 1e-3, momentum
0.99 and weight decay 5e-4, on all images of the source, and keeps the last epoch. The defaults
here train from scratch in a few epochs at 128²: a learning rate 200 times as large with momentum
0.9 (momentum 0.99 averages over 100 steps, of which a short training has few more), on the
source's train list only, of which a fifth is held out to choose the best epoch.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset

from examples.common.datasets import Sample, length
from examples.common.progress import Progress
from examples.common.scores import mean_scores, score_cases
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.sample import DICE
from examples.fundus.source_model import Architecture
from examples.fundus.training_state import (
    EpochReport,
    TrainingSettings,
    TrainingState,
    fingerprint,
)

HELD_OUT = 0.2  # share of the train list that chooses the best epoch


def split_held_out(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits 0 … count−1 at random into indices for training and a fifth for validation.

    Raises:
        ValueError: fewer than two images.

    Example:
        >>> [len(part) for part in split_held_out(10, seed=0)]
        [8, 2]
    """
    if count < 2:
        raise ValueError(f"the train list has {count} image(s); training needs at least 2")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(HELD_OUT * count))
    return sorted(order[held_out:]), sorted(order[:held_out])


def evaluate(
    model: torch.nn.Module, samples: Dataset[Sample], device: torch.device
) -> dict[str, float]:
    """Mean Dice (%) of disc and cup over samples, one image at a time, without adaptation.

    The model is put in evaluation mode.
    """
    return mean_scores(score_cases(model, samples, device, DICE))


def train_source(
    samples: Dataset[Sample],
    architecture: Architecture,
    settings: TrainingSettings,
    directory: Path,
    device: torch.device,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[EpochReport], None] | None = None,
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
    train_indices, held_out_indices = split_held_out(length(samples), settings.seed)
    training = AugmentedDataset(Subset(samples, train_indices), settings.seed)
    held_out = Subset(samples, held_out_indices)
    directory.mkdir(parents=True, exist_ok=True)
    state = TrainingState(architecture, settings, fingerprint(samples, root), device)
    if resume and (directory / "last.pt").exists():
        state.restore(directory / "last.pt")
        if on_resume is not None:
            on_resume()
    shown = Progress(
        settings.epochs,
        f"train {architecture.source}" if progress else None,
        "epoch",
        initial=len(state.history),
        every_round=True,
    )
    with shown:
        for epoch in range(len(state.history), settings.epochs):
            loss = state.run_epoch(training, epoch)
            report = EpochReport(epoch + 1, loss, **evaluate(state.model, held_out, device))
            is_best = all(report.score > earlier.score for earlier in state.history)
            state.history.append(report)
            # The best first: if the run dies between the two files, the epoch is run again.
            if is_best:
                state.save(directory / "best.pt", complete=False)
            state.save(directory / "last.pt", complete=True)
            shown.update(f"loss={loss:.3f}, disc={report.disc:.1f}%, cup={report.cup:.1f}%")
            if on_epoch is not None:
                on_epoch(report)
    return directory / "best.pt"
