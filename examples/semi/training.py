"""The training of all methods: FixMatch across sites, whose optimizer and objectives are arguments.

With labelled images S of one site and unlabelled images U of all, a student with weights θ and its
mean teacher:

    L_S = cross-entropy + Dice on S, weakly augmented, with low-frequency amplitudes of U
    L_U = the same on strong variants of U, mixed by CutMix, against the teacher's predictions for
          weak variants, where the teacher's probability is at least `threshold` or at most
          1 − `threshold`
    task = L_S + w(t)·L_U,   w(t) = w·exp(−5·(1 − t/T)²)
    divergence = D_f(S ‖ U)

Sohn et al., "FixMatch", NeurIPS 2020, https://arxiv.org/abs/2001.07685, with the recipe of MiDSS
(Ma et al., CVPR 2024, https://arxiv.org/abs/2404.08951) and its code: SGD with learning rate 0.03,
momentum 0.9, weight decay 1e-4 and a polynomial schedule, batches of 4 and 4, teacher's decay 0.99
with warm-up, threshold 0.95. MiDSS's own method (its intermediate samples) is not here. T is the
training's length, which MiDSS's ramp has, too.

S and U pass the student one after the other, so that batch normalisation never mixes their
statistics. The teacher's are its own, of U, weakly augmented (of S where there is no U). Those of
the student do not fit averaged weights: tested with them, a teacher of decay 0.99 finds nothing for
the first 150 steps or so.

The Dice of L_U is smoothed by 1e-5 only. As long as the teacher is sure of nothing but background,
the target is empty and Dice is 1 − s/(Σp + s): with the usual s = 1 its gradient grows as the
predictions shrink, and the network learns that there is nothing to find. With s → 0 it has no
gradient (MiDSS's s is 1e-10).

The divergence and its place in the step are those of `gk.DiM`, a reconstruction.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

import gradkit as gk
from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample, fingerprint, length
from examples.common.losses import segmentation_loss
from examples.common.metrics import dice, mean, segment
from examples.common.tensorboard import ScalarWriter
from examples.common.training import LAST, Entry, Training, restore, train
from examples.semi.batches import Batch, Batches
from examples.semi.data import Data
from examples.semi.methods import Method, build_divergence, build_optimizer
from examples.semi.network import UNet
from examples.semi.task import Task

FORMAT = "gradkit semi 2"

SMOOTH = 1e-5
"""Smoothing of the Dice of pseudo-labels; see above."""


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a training; the defaults are MiDSS's where it has them.

    Attributes:
        iterations: steps of the whole training.
        every: steps between two validations.
        seed: of weights and batches.
        labelled: the site with labels.
        labels: number of labelled images.
        batch_size: labelled images of a step, and as many unlabelled ones.
        accumulate: parts into which a batch is split, one after the other in memory.
        learning_rate: of the first step.
        momentum: of SGD.
        weight_decay: L2 penalty.
        decay: the teacher's.
        threshold: confidence of a pseudo-label.
        consistency: the weight w that L_U has at the end.
        cutmix: whether unlabelled images are mixed.
        amplitude: whether labelled images take over unlabelled ones' appearance.
        rho: radius of the ascent of sharpness-aware methods.
        divergence_weight: λ.
        tolerance: of the divergence.
        running: decay of its running histograms.
        amp: half precision in the forward pass; None: on a GPU only.
        patience: validations without a better one after which it ends; None: never.
    """

    iterations: int = 2000
    every: int = 100
    seed: int = 0
    labelled: str = ""
    labels: int = 20
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: float = 0.99
    threshold: float = 0.95
    consistency: float = 1.0
    cutmix: bool = True
    amplitude: bool = True
    rho: float = 0.05
    divergence_weight: float = 0.1
    tolerance: float = 0.0
    running: float = 0.0
    amp: bool | None = None
    patience: int | None = None

    @property
    def epochs(self) -> int:
        """Validations of the whole training."""
        return -(-self.iterations // self.every)


def ramp_up(iteration: int, iterations: int) -> float:
    """exp(−5·(1 − t/T)²), of an iteration counted from 0.

    Example:
        >>> round(ramp_up(0, 100), 4), ramp_up(100, 100)
        (0.0067, 1.0)
    """
    return math.exp(-5 * (1 - min(1.0, iteration / iterations)) ** 2)


@torch.no_grad()
def pseudo_labels(
    teacher: nn.Module, weak: Float[Tensor, "n c h w"], threshold: float
) -> tuple[Float[Tensor, "n s h w"], Float[Tensor, "n s h w"]]:
    """The teacher's predictions, and where it is sure of them: both 0 or 1.

    As in MiDSS, the teacher normalises by the batch's own statistics, of which its buffers keep the
    running mean.
    """
    teacher.train()
    p = teacher(weak).float().sigmoid()
    sure = (p >= threshold) | (p <= 1 - threshold)
    return (p >= 0.5).float(), sure.float()


def mix(x: Float[Tensor, "n c h w"], box: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
    """CutMix: each image with its neighbour in the batch where the box is 1.

    Example:
        >>> mix(torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1), torch.ones(2, 1, 1, 1)).flatten()
        tensor([2., 1.])
    """
    return torch.where(box > 0.5, x.roll(1, 0), x)


class Run:
    """One training: a method on an experiment's data, with student, teacher and optimizer.

    Args:
        task: what is segmented.
        data: to train and validate on.
        method: what the step and its objectives are.
        settings: hyper-parameters.
        size: side of the images, pixels.
        width: of the network.
        device: where to compute.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        method: Method,
        settings: Settings,
        size: int,
        width: int,
        device: torch.device,
    ) -> None:
        self.task, self.data, self.method, self.settings = task, data, method, settings
        self.size, self.width, self.device = size, width, device
        self.amp = device.type == "cuda" if settings.amp is None else settings.amp
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.student = UNet(task.channels, len(task.structures), width).to(device)
            self.divergence = self._build_divergence()
        self.base = torch.optim.SGD(
            self.student.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        # The student's statistics do not fit averaged weights: the teacher takes its own.
        self.ema = gk.EMA(self.student, decay=settings.decay, warmup=True, buffers="skip")
        self.teacher = self.ema.teacher.eval()
        self.optimizer = build_optimizer(
            method,
            self.base,
            # Running histograms are buffers, which move once a step as batch normalisation's do.
            self._modules(),
            settings.rho,
            settings.divergence_weight,
            settings.iterations,
            self.ema,
            scaler=torch.amp.GradScaler(device.type, enabled=self.amp),
            # Losses that are not finite end the training after the epoch.
            nonfinite="ignore",
        )
        self._features: list[tuple[Tensor, Tensor]] = []
        self.critic = self._build_critic()

    def _build_divergence(self) -> nn.Module | None:
        if not self.method.has_divergence:
            return None
        return build_divergence(
            self.method,
            len(self.task.structures),
            self.width,
            self.settings.tolerance,
            self.settings.running,
        ).to(self.device)

    def _modules(self) -> nn.Module:
        if self.divergence is None:
            return self.student
        return nn.ModuleDict({"student": self.student, "divergence": self.divergence})

    def _build_critic(self) -> torch.optim.Optimizer | None:
        """The critic's own optimizer, which steps after each step of the student."""
        if self.divergence is None or self.method.level != "critic":
            return None
        self.optimizer.register_step_post_hook(lambda *_: self.train_critic())
        return torch.optim.Adam(self.divergence.parameters(), lr=1e-3)

    def train_critic(self) -> None:
        """One step of the critic, on the features at the weights that the step began with."""
        assert self.divergence is not None
        assert self.critic is not None
        step = self.optimizer.last_step
        if step is None or not step.applied:
            return
        self.critic.zero_grad()
        for source, target in self._features:
            (self.divergence(source, target) / len(self._features)).backward()
        self.critic.step()
        self._features = []

    def objectives(self, batch: Batch) -> Callable[[], Any]:
        """What the step minimises: "task", and "divergence" where the method has one.

        Pseudo-labels are made once, before the step, so that they are the same at displaced
        weights.
        """
        parts = [part.to(self.device) for part in split(batch, self.settings.accumulate)]
        labels = [self._pseudo_labels(part) for part in parts]
        self._features = []

        def whole() -> dict[str, Tensor]:
            return self._losses(parts[0], labels[0], 1)

        def in_parts() -> Iterator[dict[str, Tensor]]:
            for part, label in zip(parts, labels, strict=True):
                yield self._losses(part, label, len(parts))

        return whole if len(parts) == 1 else in_parts

    def _pseudo_labels(self, part: Batch) -> tuple[Tensor, Tensor] | None:
        """Labels of the unlabelled images, and where they count; None where there are no images.

        The teacher then sees the labelled ones, for its statistics.
        """
        unlabelled = self.method.is_semi_supervised
        with torch.autocast(self.device.type, torch.float16, enabled=self.amp):
            label, sure = pseudo_labels(
                self.teacher, part.weak if unlabelled else part.image, self.settings.threshold
            )
        return (mix(label, part.box), mix(sure, part.box)) if unlabelled else None

    def _losses(
        self, part: Batch, labels: tuple[Tensor, Tensor] | None, count: int
    ) -> dict[str, Tensor]:
        """Losses of one of `count` parts of a batch."""
        autocast = torch.autocast(self.device.type, torch.float16, enabled=self.amp)
        with autocast:
            source = self.student.segment(part.image)
        task = segmentation_loss(source.logits, part.target)
        if labels is None:
            return {"task": task / count}
        with autocast:
            target = self.student.segment(mix(part.strong, part.box))
        label, sure = labels
        ramp = ramp_up(part.iteration, self.settings.iterations)
        unsupervised = segmentation_loss(target.logits, label, SMOOTH, weight=sure)
        task = task + self.settings.consistency * ramp * unsupervised
        losses = {"task": task / count}
        if self.divergence is not None:
            pair = source.logits.float(), target.logits.float()
            if self.method.level != "prob":
                pair = source.features.float(), target.features.float()
                if self.critic is not None and len(self._features) < count:  # the first evaluation
                    self._features.append((pair[0].detach(), pair[1].detach()))
            losses["divergence"] = self.divergence(*pair) / count
        return losses

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches between two validations."""
        settings = self.settings
        batches = Batches(
            self.data,
            settings.seed,
            settings.batch_size,
            settings.batch_size if self.method.is_semi_supervised else 0,
            self.task.strong,
            settings.cutmix,
            settings.amplitude,
            settings.iterations,
            self.size,
        )
        return batches.between(epoch * settings.every, (epoch + 1) * settings.every)

    def validate(self) -> dict[str, float]:
        """The teacher's Dice (%) and loss on each site's held-out images."""
        scores = {}
        for site, samples in self.data.validation.items():
            found = validate(self.teacher, samples, self.device)
            scores |= {f"{name}_{site}": value for name, value in found.items()}
        return scores

    def select(self, entry: Entry) -> float:
        """The Dice of the labelled site's held-out images, by which the best weights are chosen."""
        return entry[f"dice_{self.settings.labelled}"]

    def training(self) -> Training[Batch]:
        """What the loop of `examples.common.training` takes."""
        extra: dict[str, Any] = {"teacher": self.teacher}
        if self.divergence is not None:
            extra["divergence"] = self.divergence
        if self.critic is not None:
            extra["critic"] = self.critic
        shown = f"dice_{self.settings.labelled}"
        return Training(
            self.student,
            self.optimizer,
            self.objectives,
            self.batches,
            self.validate,
            self.select,
            plain_settings(self.settings, self.method),
            fingerprint(
                ConcatDataset([self.data.labelled, self.data.unlabelled]),
                self.data.root,
            ),
            details=describe(self.task, self.size, self.width),
            scheduler=torch.optim.lr_scheduler.PolynomialLR(
                self.base, self.settings.iterations, power=0.9
            ),
            extra=extra,
            count=lambda batch: len(batch.image),
            shown=lambda name: name == shown,
            patience=self.settings.patience,
            kept=("teacher",),
        )


def plain_settings(settings: Settings, method: Method) -> dict[str, Any]:
    """What a training has in common with those that it may continue, as plain values."""
    return asdict(settings) | {"epochs": settings.epochs, "method": asdict(method)}


def describe(task: Task, size: int, width: int) -> dict[str, Any]:
    """What a checkpoint tells of its network."""
    return {"format": FORMAT, "task": task.name, "size": size, "width": width}


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in parts, each with its share of labelled and unlabelled images."""
    if parts == 1:
        return [batch]
    names = ("image", "target", "weak", "strong", "box")
    pieces = {name: getattr(batch, name).chunk(parts) for name in names}
    return [
        Batch(**{name: pieces[name][number] for name in names}, iteration=batch.iteration)
        for number in range(parts)
    ]


@torch.no_grad()
def validate(
    model: nn.Module, samples: Dataset[Sample], device: torch.device, at_once: int = 8
) -> dict[str, float]:
    """Mean Dice (%) and mean loss over images; the model is in evaluation mode afterwards."""
    model.eval()
    overlaps: list[float] = []
    losses: list[float] = []
    everything = [samples[index] for index in range(length(samples))]
    for start in range(0, len(everything), at_once):
        some = everything[start : start + at_once]
        logits = model(torch.stack([sample.image for sample in some]).to(device)).float().cpu()
        target = torch.stack([sample.target for sample in some])
        overlaps += dice(segment(logits), target, 2).mean(1).tolist()
        losses += [
            segmentation_loss(one[None], two[None]).item()
            for one, two in zip(logits, target, strict=True)
        ]
    return {"dice": mean(overlaps), "loss": mean(losses)}


def fit(
    run: Run,
    directory: Path,
    description: str | None = None,
    on_epoch: Callable[[Entry], None] | None = None,
) -> Path:
    """Trains, going on from where an earlier training in the folder has stopped.

    Besides the checkpoints it writes curves for TensorBoard.

    Args:
        run: new.
        directory: of this run alone.
        description: what lines of progress begin with; None shows none.
        on_epoch: called after each validation.

    Returns:
        The path of the checkpoint of the best weights.

    Raises:
        CheckpointError: what is in the folder is unreadable or of another training.
        TrainingError: it is of other data, or a loss is no longer finite.
    """
    training = run.training()
    last = directory / LAST
    if last.exists():
        check_details(last, load(last), training.details)
        restore(training, last)
    with ScalarWriter(directory) as writer:

        def record(entry: Entry) -> None:
            step = min(int(entry["epoch"]) * run.settings.every, run.settings.iterations)
            writer.add({name: value for name, value in entry.items() if name != "epoch"}, step)
            if on_epoch is not None:
                on_epoch(entry)

        return train(training, directory, description, record, unit="validation")


def check_details(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Makes sure that a checkpoint is of this program, task and network.

    Raises:
        CheckpointError: it is not.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{path}: its {name} is {found.get(name)!r}, not {value!r}; repeat that value, or "
                "start anew, in another --out or with --overwrite"
            )


@dataclass(frozen=True)
class Trained:
    """The best weights of a training, and how it went.

    Attributes:
        student: in evaluation mode.
        teacher: in evaluation mode.
        method: that trained them.
        settings: of the training.
        history: up to the best validation.
        size: side of the images, pixels.
    """

    student: UNet
    teacher: UNet
    method: Method
    settings: dict[str, Any]
    history: list[Entry]
    size: int


def load_trained(path: Path, task: Task, device: torch.device) -> Trained:
    """Reads a checkpoint of `fit`.

    Raises:
        CheckpointError: it is unreadable, or not of this task.
    """
    content = load(path)
    if content.get("format") != FORMAT or content.get("task") != task.name:
        raise CheckpointError(
            f"{path}: not a checkpoint of this task; make one with `{task.prog} train`"
        )
    try:
        size, width = int(content["size"]), int(content["width"])
        networks = []
        for name in ("model", "teacher"):
            with torch.random.fork_rng(devices=[]):
                network = UNet(task.channels, len(task.structures), width)
            network.load_state_dict(content[name])
            networks.append(network.to(device).eval())
        settings, history = dict(content["settings"]), list(content["history"])
        method = Method(**settings["method"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a complete checkpoint; train it again or pass another one"
        ) from error
    return Trained(*networks, method, settings, history, size)
