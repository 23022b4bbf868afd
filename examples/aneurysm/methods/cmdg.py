"""CMDG: random shallow networks and blended appearances (GIN and IPA), with consistency."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from examples.aneurysm.augmentation import blend_field, gin, torch_generator
from examples.aneurysm.losses import consistency, dice_ce
from examples.aneurysm.methods.method import Batch, Method
from examples.aneurysm.patches import Patch
from examples.common.training import Objectives

CONSISTENCY = 10.0  # weight
COPIES = ("first", "second", "third")


class CMDG(Method):
    """Causality-inspired domain generalization ([arXiv:2111.12525](https://arxiv.org/abs/2111.12525)).

    Three copies by GIN, of which two are blended by a smooth random field and its complement (the
    interventional pseudo-correlation augmentation): Dice plus cross-entropy on the first, and ten
    times the divergence of all three predictions. The published field is a B-spline; here a coarse
    grid is interpolated trilinearly.
    """

    def views(self, image: Tensor, other: Callable[[], Tensor], rng: np.random.Generator) -> Patch:
        a, b, c = (gin(image, torch_generator(rng)) for _ in range(3))
        field = blend_field(image.shape[1:], torch_generator(rng))
        blended = (field * a + (1 - field) * b, (1 - field) * a + field * b)
        return dict(zip(COPIES, (*blended, c), strict=True))

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        def loss() -> Tensor:
            copies = torch.cat([batch[name] for name in COPIES])
            logits = student(copies).logits.chunk(3)
            return dice_ce(logits[0], batch["label"]) + CONSISTENCY * consistency(logits)

        return loss
