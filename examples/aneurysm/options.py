"""Options that the commands share, and their checks."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from examples.aneurysm.data import (
    ANEURYSM,
    SYNTHETIC,
    available_centres,
    check,
    lost,
    open_centre,
)
from examples.aneurysm.methods import WITH_TEACHER
from examples.aneurysm.networks import NetworkName
from examples.aneurysm.settings import PresetName, Schedule, TeacherKind, TrainingSettings
from examples.common.datasets import Sample, length
from examples.common.usage import UsageError, open_device, require

SMALLEST_PATCH = 16
RESUME = "go on with the same command and --resume"


@dataclass(frozen=True)
class TrainingOptions:
    """What commands that train have in common."""

    data_root: str = "synthetic"
    """Folder of datalist.json, or "synthetic" for generated angiograms."""
    volumes: int = 10
    """Synthetic volumes of each centre, at least 2; all of a folder's are used."""
    size: int = 32
    """Voxels along the longest side of a volume, after resampling to cubic voxels."""
    patch: int = 16
    """Side of training patches and of sliding windows, voxels; a multiple of 8, at least 16."""
    network: NetworkName = "unet"
    """unet (small, for CPUs) or swin (two-stage Swin U-Net, as the paper's)."""
    width: int = 8
    """Channels of the network's first level; 24 is the published Swin U-Net."""
    preset: PresetName = "paper"
    """Whose loss weights, gate and optimizer GS-EMA has: the paper's text or the authors' code."""
    teacher: TeacherKind = "frozen"
    """Of ema, gsema and the contrasts: frozen (it only follows, as in the authors' code) or
    supervised (it is trained on both views, too: the paper's Equation 6)."""
    iterations: int = 300
    """Training steps; rounded up to a multiple of --validations."""
    validations: int = 3
    """How often the held-in cases are validated; the best time is kept."""
    batch_size: int = 2
    """Patches of a step (in each process)."""
    learning_rate: float | None = 1e-2
    """Of Adam, for short trainings; None takes the preset's. nnunet keeps its own optimizer."""
    schedule: Schedule | None = "polynomial"
    """How it falls: polynomial, steps or constant; None takes the preset's."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: slower, less memory."""
    workers: int = 0
    """Processes that make patches; 0: none but the training's own."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large patches on an idle machine."""

    def check(self) -> None:
        """Makes sure that all of them are in range.

        Raises:
            UsageError: One is not.
        """
        for name, least in (
            ("volumes", 2), ("iterations", 1), ("validations", 1), ("batch_size", 1),
            ("threads", 1), ("workers", 0), ("size", 16), ("width", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            option = name.replace("_", "-")
            require(value >= least, f"--{option} is {value}; choose at least {least}")
        require(
            self.patch >= SMALLEST_PATCH and self.patch % 8 == 0,
            f"--patch is {self.patch}; choose a multiple of 8 voxels, at least {SMALLEST_PATCH}",
        )
        require(
            self.network != "swin" or self.width % 3 == 0,
            f"--width is {self.width}; the swin network needs a multiple of 3, such as 24",
        )
        require(
            self.validations <= self.iterations,
            f"--validations is {self.validations}; choose at most as many as --iterations "
            f"({self.iterations})",
        )
        rate = self.learning_rate
        require(
            rate is None or (rate > 0 and math.isfinite(rate)),
            f"--learning-rate is {rate}; choose a positive number",
        )

    def settings(self, method: str, seed: int) -> TrainingSettings:
        """The settings of one training."""
        return TrainingSettings(
            method=method,
            preset=self.preset,
            teacher=self.teacher,
            epochs=self.validations,
            interval=math.ceil(self.iterations / self.validations),
            seed=seed,
            network=self.network,
            width=self.width,
            patch=self.patch,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            checkpointing=self.checkpointing,
            workers=self.workers,
        )

    def kind(self) -> str:
        """The kind of data root, `synthetic` or `folder`."""
        return SYNTHETIC if self.data_root == SYNTHETIC else "folder"

    def open_centres(
        self, held_out: Sequence[str], scored: bool = True
    ) -> dict[str, Dataset[Sample]]:
        """The centres, all of them checked; each that is trained on has at least two volumes.

        Args:
            held_out: Centres that are left out, one after the other.
            scored: Whether these are scored; if not, they are not opened and need no labels.

        Raises:
            DataError: Something is wrong with the data.
            UsageError: A centre has a single volume, or those to train on show no aneurysm.
        """
        names = available_centres(self.data_root)
        require(
            len(names) > 1,
            f"--data-root {self.data_root} has only the centre {names[0]!r}; give volumes of at "
            "least two centres, one of which is held out",
        )
        checked = check(self.data_root, names, self.size, () if scored else held_out)
        for left_out in held_out:
            sources = [each for each in checked if each.entry.centre != left_out]
            require(
                not sources or any(each.shown for each in sources),
                f"no volume of {self.data_root} but those of {left_out}, which is held out, shows "
                f"an aneurysm (label {ANEURYSM}) at --size {self.size}; correct the labels, or "
                "choose a larger --size",
            )
        note = lost(checked, self.size)
        if note is not None:
            print(note, file=sys.stderr)
        centres = {
            name: open_centre(self.data_root, name, self.size, length=self.volumes, checked=checked)
            for name in names
            if scored or name not in held_out
        }
        for name, samples in centres.items():
            require(
                length(samples) > 1 or [name] == list(held_out),
                f"{name} has 1 volume in {self.data_root}; give at least 2, one of which validates",
            )
        return centres

    def open_device(self) -> torch.device:
        """The device, on which this process uses `threads` threads."""
        return open_device(self.device, self.threads)


def check_methods(methods: Sequence[str], preset: PresetName, teacher: TeacherKind) -> None:
    """Refuses a method that a preset makes the same as another one, and an option without effect.

    Raises:
        UsageError: One is the contrast of volumes, which the authors' code does not weigh, or none
            has the teacher that is to be supervised.
    """
    require(
        teacher == "frozen" or any(method in WITH_TEACHER for method in methods),
        f"--teacher {teacher} has no effect on {', '.join(methods)}; choose a method with a "
        f"teacher ({', '.join(WITH_TEACHER)}), or leave the option out",
    )
    if "bacl-v" in methods and preset == "code":
        raise UsageError(
            "--preset code has no weight for bacl-v, the contrast of volumes; choose bacl, or "
            "--preset paper"
        )


def refuse_earlier(folders: list[Path]) -> None:
    """Makes sure that no training is in these folders.

    Raises:
        UsageError: There is one.
    """
    for folder in folders:
        require(
            not (folder / "last.pt").exists(),
            f"{folder} holds a training; {RESUME}, choose another --out, or replace it with "
            "--overwrite",
        )
