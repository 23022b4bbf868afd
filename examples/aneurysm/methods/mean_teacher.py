"""Two domains with and without a mean teacher: no EMA, EMA, GS-EMA and its contrasts (BACL)."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import gradkit as gk
from examples.aneurysm.augmentation import build_appearance, gin, torch_generator, vary
from examples.aneurysm.losses import dice_ce
from examples.aneurysm.methods.method import Batch, Method
from examples.aneurysm.patches import Patch
from examples.aneurysm.settings import DECAY, TrainingSettings
from examples.common.training import Objectives

Part = Literal["volume", "boundary", "both"]


class NoTeacher(Method):
    """The student on source patches and on their transforms, which share the label ("no EMA").

    The first half of Equation 6 of [GS-EMA](https://arxiv.org/abs/2402.15239): objectives
    "source" and "target", each the Dice and cross-entropy loss times the preset's weight.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        super().__init__(settings)
        self._appearance = build_appearance()

    def views(self, image: Tensor, other: Callable[[], Tensor], rng: np.random.Generator) -> Patch:
        """Source, target, and the teacher's target, for which GIN is drawn anew."""
        target = vary(self._appearance, image, int(rng.integers(2**31)))
        views = {"source": image, "target": gin(target, torch_generator(rng))}
        return {**views, "teacher_target": gin(target, torch_generator(rng))}

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        weight, label = self.preset.segmentation, batch["label"]

        def losses() -> dict[str, Tensor]:
            return {
                name: weight * dice_ce(student(batch[name]).logits, label)
                for name in ("source", "target")
            }

        return losses


class PlainEMA(NoTeacher):
    """`NoTeacher`, and a mean teacher with a constant decay, which is evaluated."""

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        ema = gk.EMA(student, decay=DECAY, warmup=self.preset.warmup)
        self.teacher = ema.teacher
        return gk.wrap(self.base(student), ema, model=student, nonfinite="ignore", scaler=scaler)


class GSEMA(NoTeacher):
    """`NoTeacher`, and a teacher that follows by whether both gradients agree.

    Args:
        settings: Of the training.
        part: Which contrast of latents joins the losses: of volumes (BACL-V), of boundaries
            (BACL-B), or both (BACL); None is GS-EMA alone.
    """

    def __init__(self, settings: TrainingSettings, part: Part | None = None) -> None:
        super().__init__(settings)
        preset = self.preset
        self.contrasts: dict[Literal["volume", "boundary"], float] = {}
        if part in ("volume", "both"):
            self.contrasts["volume"] = preset.volume
        if part in ("boundary", "both"):
            self.contrasts["boundary"] = preset.boundary

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        gate = gk.GatedEMA(
            student,
            measure=self.preset.measure,
            decay_aligned=DECAY,
            decay_conflict=self.preset.decay_conflict,
            warmup=self.preset.warmup,
        )
        self.teacher = gate.teacher
        return gk.wrap(self.base(student), gate, model=student, nonfinite="ignore", scaler=scaler)

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        if not any(self.contrasts.values()):
            return super().objectives(student, batch)
        weight, label, teacher = self.preset.segmentation, batch["label"], self.teacher
        assert teacher is not None  # made by `wrap`

        def losses() -> dict[str, Tensor]:
            source, target = student(batch["source"]), student(batch["target"])
            with torch.no_grad():
                teacher_source = teacher(batch["source"])
                teacher_target = teacher(batch["teacher_target"])
            latents = [output.latent for output in (source, target, teacher_source, teacher_target)]
            contrast = sum(
                share
                * gk.losses.boundary_aware_contrast(
                    *latents,
                    part=part,
                    symmetric=self.preset.symmetric,
                    inverse=self.preset.inverse,
                )
                for part, share in self.contrasts.items()
                if share > 0
            )
            return {
                "source": weight * dice_ce(source.logits, label),
                "target": weight * dice_ce(target.logits, label),
                "contrast": torch.as_tensor(contrast),
            }

        return losses
