"""Optic disc and cup at a centre that the training has not seen, its objectives the other centres.

One centre is held out. Each of the others is an objective: binary cross-entropy plus soft Dice of
a batch of its own training images. Scored is the Dice of disc and cup on the test images of the
centre that was held out, and on those of the centres trained on. A seed changes the network's
first weights, augmentation, order and the strategy's own random numbers; two strategies with the
same seed and centre differ in nothing else. Training images are varied as in `examples.fundus`,
with its random shift, since crops are centred on the disc.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count

import torch
from torch import Tensor, nn

from benchmarks.alignment.jobs import run_jobs
from benchmarks.alignment.training import Training, train
from examples.common.losses import segmentation_loss
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.data import available_domains, open_domain
from examples.fundus.network import ResUNet34
from examples.fundus.training import evaluate

LR = 2e-3
STEPS = 300
BATCH = 8
VARIANTS = 20
"""An image comes in so many variants, one an epoch, and then in the same again. They are kept: to
make one takes longer than to train on it."""
CPU = torch.device("cpu")
SCORES = ("unseen", "seen")


@dataclass(frozen=True)
class Setting:
    """What all trainings have in common.

    Attributes:
        root: Folder of the lists and images, or "synthetic".
        size: Side of the square images, pixels.
        width: Channels of the network's first stage.
        images: Images of each list to use; None is all.
        lr: Adam's first learning rate.
        steps: Steps of a training.
    """

    root: str
    size: int
    width: int
    images: int | None
    lr: float
    steps: int


@lru_cache(maxsize=5 * VARIANTS)
def variants(setting: Setting, centre: str, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """All training images of a centre and their targets, varied as in this epoch."""
    samples = open_domain(setting.root, centre, "train", setting.size, 0, setting.images)
    augmented = AugmentedDataset(samples, seed)
    augmented.epoch = epoch
    images, targets = zip(*(augmented[n] for n in range(len(augmented))), strict=True)
    return torch.stack(images), torch.stack(targets)


def batches(setting: Setting, centre: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a centre's training images without end, a new order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in count():
        images, targets = variants(setting, centre, seed, epoch % VARIANTS)
        for places in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(places) == min(BATCH, len(images)):  # a last, smaller one is left out
                yield images[places], targets[places]


def _loss(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    return segmentation_loss(model(image), target)


@dataclass(frozen=True)
class _Job:
    strategy: str
    held_out: str
    seed: int
    setting: Setting


def _run(job: _Job) -> tuple[dict[str, tuple[float, float]], Training]:
    """The Dice of disc and cup at each centre, and the training."""
    setting = job.setting
    centres = available_domains(setting.root)
    seen = [centre for centre in centres if centre != job.held_out]
    streams = {centre: batches(setting, centre, job.seed) for centre in seen}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = ResUNet34(setting.width)
        objectives = (
            {centre: partial(_loss, model, *next(stream)) for centre, stream in streams.items()}
            for _ in count()
        )
        done = train(
            model, objectives, job.strategy, len(seen), job.seed, setting.lr, setting.steps
        )
    scores = {}
    for centre in centres:
        samples = open_domain(setting.root, centre, "test", setting.size, 0, setting.images)
        dice = evaluate(model, samples, CPU)
        scores[centre] = dice["disc"], dice["cup"]
    return scores, done


def run_fundus(
    names: Sequence[str], held_out: Sequence[str], seeds: int, setting: Setting, workers: int
) -> list[dict[str, object]]:
    """Trains with every strategy, centre held out and seed; a row for each training."""
    jobs = [
        _Job(name, centre, seed, setting)
        for seed in range(seeds)
        for centre in held_out
        for name in names
    ]
    rows: list[dict[str, object]] = []
    for job, (scores, done) in zip(jobs, run_jobs(_run, jobs, workers, "fundus"), strict=True):
        means = {centre: (disc + cup) / 2 for centre, (disc, cup) in scores.items()}
        unseen = means.pop(job.held_out)
        rows.append(
            {
                "strategy": job.strategy,
                "held out": job.held_out,
                "seed": job.seed,
                "unseen": unseen,
                "seen": sum(means.values()) / len(means),
                "disc": scores[job.held_out][0],
                "cup": scores[job.held_out][1],
                "scores": scores,
                "conflict": done.conflict,
                "milliseconds": done.milliseconds,
                "error": done.error,
            }
        )
    return rows
