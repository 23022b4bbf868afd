"""What a method is to the trainer: views of a patch, objectives, and an optimizer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import gradkit as gk
from examples.aneurysm.losses import dice_ce
from examples.aneurysm.patches import Patch
from examples.aneurysm.settings import PRESET, TrainingSettings
from examples.common.training import Objectives

Batch: TypeAlias = dict[str, Tensor]
"""Views by name [n, 1, P, P, P], and their `label` [n, P, P, P]."""


class Method:
    """Supervised training on the source centres, and what all methods inherit.

    Args:
        settings: Of the training.

    Attributes:
        deep_supervision: Whether the network needs logits of coarser stages.
        mirror: Whether volumes are also segmented mirrored, and predictions averaged.
        teacher: The module that is evaluated instead of the student, once `wrap` has made it.
    """

    deep_supervision = False
    mirror = False

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings = settings
        self.preset = PRESET[settings.preset]
        self.teacher: nn.Module | None = None

    @property
    def foreground(self) -> float:
        """Share of patches round an aneurysm."""
        return self.settings.foreground

    def views(self, image: Tensor, other: Callable[[], Tensor], rng: np.random.Generator) -> Patch:
        """The views of a patch.

        Args:
            image: The patch [1, P, P, P], after the geometry that it shares with its label.
            other: Draws a patch of another centre.
            rng: All randomness.
        """
        return {"source": image}

    def base(self, student: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that gradkit wraps."""
        rate = self.settings.learning_rate
        return torch.optim.Adam(
            student.parameters(), lr=self.preset.learning_rate if rate is None else rate
        )

    def schedule(self) -> Any:
        """How the learning rate falls."""
        return self.settings.schedule or self.preset.schedule

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        """The optimizer; losses that are not finite end the training after the epoch."""
        return gk.wrap(self.base(student), model=student, nonfinite="ignore", scaler=scaler)

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        """What the optimizer's step takes."""
        return lambda: dice_ce(student(batch["source"]).logits, batch["label"])
