"""Settings of a training, and the presets of GS-EMA."""

from dataclasses import dataclass
from typing import Literal, get_args

from examples.aneurysm.networks import NetworkName

PresetName = Literal["paper", "code"]
Schedule = Literal["polynomial", "steps", "constant"]
TeacherKind = Literal["frozen", "supervised"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Preset:
    """What the paper's text and the authors' code set differently.

    Attributes:
        segmentation: Weight of each of the student's two losses, and of the teacher's two where it
            is supervised; those of a frozen teacher are constants.
        volume: Weight of the contrast of latents.
        boundary: Weight of the contrast of their high frequencies.
        symmetric: Whether the high-pass window is symmetric.
        inverse: What is taken of the inverse transform.
        measure: Of the angle between the gradients of source and target.
        decay_conflict: Of the teacher in conflict; None does not move it.
        warmup: Whether the teacher starts as a plain mean.
        learning_rate: Of Adam.
        schedule: How the learning rate falls.
    """

    segmentation: float
    volume: float
    boundary: float
    symmetric: bool
    inverse: Literal["real", "abs"]
    measure: Literal["cosine", "sign_cosine"]
    decay_conflict: float | None
    warmup: bool
    learning_rate: float
    schedule: Schedule


PRESET: dict[str, Preset] = {
    # Equation 6 with λ1 : λ2 = 0.25 : 0.5, and the text's rule: no update in conflict.
    "paper": Preset(0.25, 0.5, 0.5, True, "real", "cosine", None, False, 1e-3, "steps"),
    # 0.8 × the mean of four losses + 0.2 × the contrast of boundaries.
    "code": Preset(0.2, 0.0, 0.2, False, "abs", "sign_cosine", 0.999, True, 1e-4, "constant"),
}
DECAY = 0.9
"""Of the teacher when gradients are aligned, and of a plain mean teacher."""


@dataclass(frozen=True)
class TrainingSettings:
    """Hyper-parameters of a training.

    Attributes:
        method: See `methods`.
        preset: Whose weights, gate and optimizer GS-EMA takes.
        teacher: Whether a mean teacher only follows the student, as in the authors' code, or is
            trained on both views, too, as in Equation 6.
        epochs: Number of validations, each after `interval` iterations.
        interval: Iterations between them.
        seed: Of weights, split and patches.
        network: Which network.
        width: Channels of its first level.
        patch: Side of a patch, voxels.
        batch_size: Patches of an iteration, in each process.
        learning_rate: Of Adam; None takes the preset's.
        schedule: How it falls; None takes the preset's.
        foreground: Share of patches round an aneurysm.
        checkpointing: Whether activations are computed again in the backward pass.
        amp: Half precision in the forward pass; None: on a GPU only.
        workers: Processes that make patches; 0 makes them in the training's own. Without effect on
            the result.
    """

    method: str = "gsema"
    preset: PresetName = "paper"
    teacher: TeacherKind = "frozen"
    epochs: int = 5
    interval: int = 40
    seed: int = 0
    network: NetworkName = "unet"
    width: int = 8
    patch: int = 32
    batch_size: int = 2
    learning_rate: float | None = None
    schedule: Schedule | None = None
    foreground: float = 0.5
    checkpointing: bool = False
    amp: bool | None = None
    workers: int = 0

    @property
    def iterations(self) -> int:
        """Iterations in all."""
        return self.epochs * self.interval


def schedule_factor(schedule: Schedule, iteration: int, iterations: int) -> float:
    """The factor of the learning rate at an iteration counted from 0.

    `polynomial` is (1 − i/n)^0.9. `steps` is × 0.1 after each tenth of the training, as in the
    paper, but not below 0.01, for after 100 epochs the paper's would be 1e-10.

    Example:
        >>> [round(schedule_factor("steps", i, 100), 4) for i in (0, 10, 20, 90)]
        [1.0, 0.1, 0.01, 0.01]
    """
    if schedule == "constant":
        return 1.0
    if schedule == "steps":
        return float(max(0.1 ** (10 * iteration // iterations), 0.01))
    return (1 - min(iteration, iterations) / iterations) ** 0.9
