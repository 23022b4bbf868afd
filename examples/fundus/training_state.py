"""One source training between two epochs: loss, schedule, and what a checkpoint must hold."""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample, length
from examples.fundus.augmentation import AugmentedDataset
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import Architecture, read_architecture, save_source_model

ANEW = "start anew without --resume, in another --out or with --overwrite"


class TrainingError(RuntimeError):
    """The training cannot go on; the message is one line with the remedy."""


@dataclass(frozen=True)
class TrainingSettings:
    """Hyper-parameters of a source training; GraTa's values are in `training`.

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


@dataclass(frozen=True)
class Fingerprint:
    """What tells a training's data from other data, wherever their folder is.

    Attributes:
        root: kind of data root, `synthetic` or `folder`.
        count: number of images.
        names: SHA-256 of the images' names, in their order.
    """

    root: str
    count: int
    names: str

    def __str__(self) -> str:
        return f"{self.root}, {self.count} image(s), SHA-256 of their names {self.names[:8]}…"


def fingerprint(samples: Dataset[Sample], root: str) -> Fingerprint:
    """The fingerprint of samples from a kind of data root.

    Example:
        >>> samples = [Sample("a.png", torch.rand(3, 8, 8), torch.zeros(2, 8, 8))]
        >>> str(fingerprint(samples, "folder"))
        'folder, 1 image(s), SHA-256 of their names cc8441e8…'
    """
    count = length(samples)
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(samples[index].name.encode() + b"\0")  # a byte that no path can contain
    return Fingerprint(root, count, digest.hexdigest())


@dataclass(frozen=True)
class EpochReport:
    """What one epoch came to: its number from 1, mean loss, and held-out Dice in percent."""

    epoch: int
    loss: float
    disc: float
    cup: float

    @property
    def score(self) -> float:
        """Mean of disc and cup Dice, %, by which the best epoch is chosen."""
        return (self.disc + self.cup) / 2


@dataclass(frozen=True)
class Extension:
    """That a training of `epochs` got more of them once `done` were done."""

    done: int
    epochs: int


def segmentation_loss(
    logits: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"], smooth: float = 1.0
) -> Float[Tensor, ""]:
    """Binary cross-entropy (mean) plus soft Dice loss, both over the whole batch and all channels.

    Dice is 1 − (2Σpt + smooth) / (Σp + Σt + smooth) with p the sigmoid of the logits.

    Example:
        >>> target = torch.ones(1, 2, 4, 4)
        >>> round(segmentation_loss(100 * target, target).item(), 6)
        0.0
    """
    logits = logits.float()  # a sum over the batch overflows half precision
    p = logits.sigmoid()
    overlap = (2 * (p * target).sum() + smooth) / (p.sum() + target.sum() + smooth)
    return F.binary_cross_entropy_with_logits(logits, target) + 1 - overlap


def polynomial_learning_rate(base: float, epoch: int, epochs: int, power: float = 0.9) -> float:
    """The learning rate base·(1 − epoch/epochs)^power of an epoch counted from 0.

    Example:
        >>> polynomial_learning_rate(0.1, 0, 10)
        0.1
    """
    return base * math.pow(1 - epoch / epochs, power)


class TrainingState:
    """Network, optimizer and history of one training, between two epochs."""

    def __init__(
        self,
        architecture: Architecture,
        settings: TrainingSettings,
        data: Fingerprint,
        device: torch.device,
    ) -> None:
        self.architecture, self.settings, self.device = architecture, settings, device
        self.data = data
        self.history: list[EpochReport] = []
        self.extensions: list[Extension] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model: ResUNet34 = architecture.build()
        self.model.to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        self.amp = device.type == "cuda" if settings.amp is None else settings.amp
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp)

    def run_epoch(self, training: AugmentedDataset, epoch: int) -> float:
        """Trains for one epoch, counted from 0, and returns its mean loss."""
        settings = self.settings
        training.epoch = epoch
        for group in self.optimizer.param_groups:
            group["lr"] = polynomial_learning_rate(settings.learning_rate, epoch, settings.epochs)
        # A seed per epoch; multiplied so that neighbouring seeds share no epoch's order.
        order = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for image, target in DataLoader(
            training, settings.batch_size, shuffle=True, generator=order
        ):
            with torch.autocast(self.device.type, torch.float16, enabled=self.amp):
                logits = self.model(image.to(self.device))
            loss = segmentation_loss(logits, target.to(self.device))
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.detach() * len(image)
        mean_loss = total.item() / len(training)
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss is {mean_loss} in epoch {epoch + 1}; lower the training's learning rate "
                f"({settings.learning_rate})"
            )
        return mean_loss

    def save(self, path: Path, complete: bool) -> None:
        """Writes the weights, and where `complete` what a resumed training needs besides."""
        details: dict[str, Any] = {
            "settings": asdict(self.settings),
            "history": [asdict(report) for report in self.history],
            "extensions": [asdict(extension) for extension in self.extensions],
        }
        if complete:
            details["data"] = asdict(self.data)
            details["optimizer"] = self.optimizer.state_dict()
            details["scaler"] = self.scaler.state_dict()
        save_source_model(path, self.architecture, self.model.state_dict(), **details)

    def restore(self, path: Path) -> None:
        """Continues from a complete checkpoint, of as many epochs or fewer.

        Raises:
            CheckpointError: it is unreadable, or of another architecture, other settings or more
                epochs.
            TrainingError: it is of other data.
        """
        content = load(path)
        settings = content.get("settings")
        found = asdict(read_architecture(path, content))
        found |= settings if isinstance(settings, dict) else {}
        wanted = asdict(self.architecture) | asdict(self.settings)
        for name, value in wanted.items():
            other = found.get(name)
            extended = name == "epochs" and isinstance(other, int) and other < value
            if other != value and not extended:
                raise CheckpointError(
                    f"{path}: belongs to a training with {name} {other}, not {value}; "
                    f"repeat that value, or {ANEW}"
                )
        try:
            data = Fingerprint(**content["data"])
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.history = [EpochReport(**report) for report in content["history"]]
            self.extensions = [Extension(**one) for one in content.get("extensions", [])]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a complete state of a training; {ANEW}") from error
        if data != self.data:
            raise TrainingError(
                f"{path}: belongs to a training on other data ({data}), not on these "
                f"({self.data}); give the same images in the same order, or {ANEW}"
            )
        # Epoch 1 has the same learning rate in a training of any length.
        if found["epochs"] < self.settings.epochs and len(self.history) > 1:
            self.extensions.append(Extension(len(self.history), found["epochs"]))
