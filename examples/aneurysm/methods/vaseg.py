"""VASeg: supervised, with a loss on Dice and boundaries."""

from torch import nn

from examples.aneurysm.losses import vaseg
from examples.aneurysm.methods.method import Batch, Method
from examples.common.training import Objectives


class VASeg(Method):
    """Supervised training with the loss of [VASeg](https://doi.org/10.1016/j.cmpb.2023.107355).

    Its own network (16 to 128 channels, like `UNet3D` of width 16), patches of 64³ at 0.35 mm,
    batches of 4 and Adam at 3e-4 are settings that all methods share here. Written from its
    description; see `losses.vaseg` for what is reconstructed.
    """

    def objectives(self, student: nn.Module, batch: Batch) -> Objectives:
        return lambda: vaseg(student(batch["source"]).logits, batch["label"])
