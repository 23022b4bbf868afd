"""nnU-Net's training, without its planning of networks and its preprocessing."""

from typing import Any

import torch
from torch import nn

import gradkit as gk
from examples.aneurysm.losses import deep_supervision
from examples.aneurysm.methods.method import Batch, Method
from examples.common.training import Objectives


class NNUNet(Method):
    """Supervised training by the recipe of [nnU-Net](https://doi.org/10.1038/s41592-020-01008-z).

    Deep supervision, Dice plus cross-entropy, SGD with Nesterov momentum 0.99, learning rate 0.01
    falling polynomially, weight decay 3e-5, gradients of norm 12 at most, a third of the patches
    round the foreground, and mirroring at test time. Of its augmentation only the geometry that all
    methods share is taken.
    """

    deep_supervision = True
    mirror = True

    @property
    def foreground(self) -> float:
        return 1 / 3

    def base(self, student: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            student.parameters(), lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5
        )

    def schedule(self) -> Any:
        return "polynomial"

    def wrap(self, student: nn.Module, scaler: torch.amp.GradScaler | None) -> gk.GradientOptimizer:
        return gk.wrap(
            self.base(student), model=student, nonfinite="ignore", scaler=scaler, max_norm=12.0
        )

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        def loss() -> torch.Tensor:
            output = student(batch["source"])
            return deep_supervision([output.logits, *output.auxiliary], batch["label"])

        return loss
