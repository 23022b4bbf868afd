"""What all jobs of a folder of results have in common: data, size, network, models."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from examples.common.usage import require
from examples.fundus.data import SYNTHETIC, DataError, available_domains, open_domain
from examples.fundus.network import ResUNet34
from examples.fundus.sample import Split
from examples.fundus.source_model import Architecture, load_source_model, save_source_model
from examples.fundus.synthetic import SyntheticFundus
from examples.fundus.training import TrainingSettings, train_source
from examples.fundus.validation import SYNTHETIC_TRAIN_IMAGES

SYNTHETIC_TEST_IMAGES = 100
DATA_SEED = 0
"""Of synthetic photographs, for all seeds of the training, so that all adapt to the same images."""


@dataclass(frozen=True)
class Setting:
    """Data, network and folders.

    Attributes:
        root: folder of the lists and images, or "synthetic".
        shift: strength of the shift between synthetic centres; see `centre_at`.
        size: side of the square images, pixels.
        width: channels of the network's first stage.
        images: images of each target, from the start of its lists; None is all.
        epochs: of source trainings.
        train_images: of source trainings; None is all of the train list.
        device: where to compute, as torch names it.
        models: folder of the source models.
        out: folder of the results.
        heads: folder of the same source models with auxiliary heads; None is `models`.
    """

    root: str
    shift: float
    size: int
    width: int
    images: int | None
    epochs: int
    train_images: int | None
    device: str
    models: Path
    out: Path
    heads: Path | None = None

    def centres(self) -> list[str]:
        """Names of the centres, sorted."""
        return available_domains(self.root)

    def described(self) -> dict[str, object]:
        """What results that are compared with each other must have in common."""
        synthetic = self.root == SYNTHETIC
        return {
            "data": SYNTHETIC if synthetic else "folder",
            "centres": self.centres(),
            **({"shift": self.shift} if synthetic else {}),
            "size": self.size,
            "width": self.width,
            "images": self.images,
        }

    def target(self, centre: str) -> Dataset[Sample]:
        """The stream of a target: its train list, then its test list."""
        return self._open(centre, "all", self.images, SYNTHETIC_TEST_IMAGES)

    def source(self, centre: str) -> Dataset[Sample]:
        """The images that the centre's source model is trained on."""
        try:
            return self._open(centre, "train", self.train_images, SYNTHETIC_TRAIN_IMAGES)
        except DataError:  # the centre has one undivided list; all of it is for training
            return self._open(centre, "all", self.train_images, SYNTHETIC_TRAIN_IMAGES)

    def _open(self, centre: str, split: Split, limit: int | None, count: int) -> Dataset[Sample]:
        if self.root == SYNTHETIC:
            return SyntheticFundus(
                centre, limit or count, self.size, DATA_SEED, split, strength=self.shift
            )
        return open_domain(self.root, centre, split, self.size, DATA_SEED, limit)

    def model_file(self, seed: int, source: str, heads: bool = False) -> Path:
        """Where a source model is, or where it goes once it is trained; that with heads on request.

        Read are MODELS/seedN/SOURCE/SOURCE.pt, which training writes, MODELS/seedN/SOURCE.pt, and
        for seed 0 both without seedN, each also with the ending .pth.
        """
        root = self.heads if heads and self.heads is not None else self.models
        folders = [root / f"seed{seed}", *([root] if seed == 0 else [])]
        places = [
            place / f"{source}{ending}"
            for folder in folders
            for place in (folder / source, folder)
            for ending in (".pt", ".pth")
        ]
        return next((place for place in places if place.exists()), places[0])


@dataclass(frozen=True)
class SourceTraining:
    """A source model to train.

    Attributes:
        setting: data and network.
        seed: of weights, split, order and augmentation.
        source: the centre.
        progress: show epochs on standard error.
    """

    setting: Setting
    seed: int
    source: str
    progress: bool


def train_model(training: SourceTraining) -> None:
    """Trains a source model by the fundus example's training, and keeps it; goes on if begun.

    Raises:
        CheckpointError: what an earlier run has left there is of another training.
        TrainingError: it is of other data, or the loss is no longer finite.
        UsageError: there are fewer than two images to train on.
    """
    setting, source = training.setting, training.source
    samples = setting.source(source)
    count = length(samples)
    require(count >= 2, f"{source} has {count} image to train on; give at least 2")
    path = setting.model_file(training.seed, source)
    architecture = Architecture(setting.width, setting.size, source)
    best = train_source(
        samples,
        architecture,
        TrainingSettings(setting.epochs, training.seed),
        path.parent / "training",
        torch.device(setting.device),
        resume=True,
        progress=training.progress,
        root=SYNTHETIC if setting.root == SYNTHETIC else "folder",
    )
    model, _ = load_source_model(best)
    save_source_model(path, architecture, model.state_dict())


@lru_cache(maxsize=4)
def load_model(path: Path, width: int, size: int, source: str, device: str) -> ResUNet34:
    """A source model, read once by each process.

    Raises:
        CheckpointError: it is missing, or another one than expected.
    """
    model, _ = load_source_model(path, width, size, source)
    return model.to(device)


@lru_cache(maxsize=64)
def checksum(path: Path) -> str:
    """The first digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves it whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
