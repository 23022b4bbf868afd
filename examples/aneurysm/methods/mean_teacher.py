"""Two domains with and without a mean teacher: no EMA, EMA, GS-EMA and its contrasts (BACL)."""

from collections.abc import Callable, Sequence
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
    """`NoTeacher`, and a mean teacher with a constant decay, which is evaluated.

    Where the settings ask for a supervised teacher, its two losses join the student's as objective
    "teacher", and the optimizer trains it as it trains the student: Equation 6. It then moves by
    its own steps and by the average.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        super().__init__(settings)
        self.supervised = settings.teacher == "supervised"
        self.contrasts: dict[Literal["volume", "boundary"], float] = {}

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        if self.supervised:
            return self._gated(student, scaler, DECAY)  # equal decays: a plain average
        ema = gk.EMA(student, decay=DECAY, warmup=self.preset.warmup)
        self.teacher = ema.teacher
        return gk.wrap(self.base(student), ema, model=student, nonfinite="ignore", scaler=scaler)

    def _gated(
        self,
        student: nn.Module,
        scaler: torch.amp.GradScaler | None,
        decay_conflict: float | None,
    ) -> gk.GradientOptimizer:
        optimizer = gk.GSEMA(
            self.base(student),
            student,
            supervised=self.supervised,
            measure=self.preset.measure,
            decay_aligned=DECAY,
            decay_conflict=decay_conflict,
            warmup=self.preset.warmup,
            nonfinite="ignore",
            scaler=scaler,
        )
        (gate,) = optimizer.transforms
        assert isinstance(gate, gk.GatedEMA)
        self.teacher = gate.teacher
        return optimizer

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        if not (self.supervised or any(self.contrasts.values())):
            return super().objectives(student, batch)
        weight, label, teacher = self.preset.segmentation, batch["label"], self.teacher
        assert teacher is not None  # made by `wrap`

        def losses() -> dict[str, Tensor]:
            outputs = [student(batch["source"]), student(batch["target"])]
            with torch.set_grad_enabled(self.supervised):
                outputs += [teacher(batch["source"]), teacher(batch["teacher_target"])]
            source, target, *of_teacher = (
                weight * dice_ce(output.logits, label)
                for output in (outputs if self.supervised else outputs[:2])
            )
            found = {"source": source, "target": target}
            if self.supervised:
                found["teacher"] = of_teacher[0] + of_teacher[1]
            if any(self.contrasts.values()):
                found["contrast"] = self._contrast([output.latent for output in outputs])
            return found

        return losses

    def _contrast(self, latents: Sequence[Tensor]) -> Tensor:
        """The weighted contrast of source and target, of the student and then of the teacher."""
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
        return torch.as_tensor(contrast)


class GSEMA(PlainEMA):
    """`NoTeacher`, and a teacher that follows by whether both gradients agree.

    Args:
        settings: Of the training.
        part: Which contrast of latents joins the losses: of volumes (BACL-V), of boundaries
            (BACL-B), or both (BACL); None is GS-EMA alone. A supervised teacher is trained by the
            contrast, too.
    """

    def __init__(self, settings: TrainingSettings, part: Part | None = None) -> None:
        super().__init__(settings)
        if part in ("volume", "both"):
            self.contrasts["volume"] = self.preset.volume
        if part in ("boundary", "both"):
            self.contrasts["boundary"] = self.preset.boundary

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        return self._gated(student, scaler, self.preset.decay_conflict)
