"""FedDG: amplitudes of other centres, a first-order meta step, and contrast of contours."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import gradkit as gk
from examples.aneurysm.losses import contour_contrast, dice_ce
from examples.aneurysm.methods.method import Batch, Method
from examples.aneurysm.patches import Patch
from examples.common.frequency import mix_amplitude
from examples.common.training import Objectives

INNER = 1e-3  # step size of the meta step
CONTRAST = 0.1  # weight
AMPLITUDE_SHARE = 0.05  # of the spectrum on either side of frequency 0
TRAIN, TEST = "meta_train", "meta_test"


class FedDG(Method):
    """Episodic learning in frequency space ([arXiv:2103.06030](https://arxiv.org/abs/2103.06030)).

    A patch gets low-frequency amplitudes of another centre, mixed by U(0, 1). The gradient is that
    on the original patch, plus that on the mixed one at the weights after a step of 1e-3 on the
    original (`gk.MLDG`, to first order), where 0.1 times the contrast of contours is added. The
    box of frequencies is wider than published (0.05 instead of at most 0.01 of the shortest side),
    which for small patches would hold the mean alone. The published clamp of the inner gradient at
    100 is left out, and so is federation: all centres are trained on in one place.
    """

    def views(self, image: Tensor, other: Callable[[], Tensor], rng: np.random.Generator) -> Patch:
        mixed = mix_amplitude(
            image, other(), float(rng.random()), dimensions=3, share=AMPLITUDE_SHARE
        )
        return {"source": image, "mixed": mixed}

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        return gk.wrap(
            self.base(student),
            gk.MLDG(alpha=INNER, beta=1.0, test=TEST),
            model=student,
            nonfinite="ignore",
            scaler=scaler,
        )

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        label = batch["label"]

        def train() -> Tensor:
            return dice_ce(student(batch["source"]).logits, label)

        def test() -> Tensor:
            source, mixed = student(batch["source"]), student(batch["mixed"])
            contrast = contour_contrast([source.features, mixed.features], label)
            return dice_ce(mixed.logits, label) + CONTRAST * contrast

        return {TRAIN: train, TEST: test}
