"""What every set of fundus photographs yields: `Sample`s of three colours and two nested masks."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from examples.common.metrics import dice_of

Split = Literal["all", "train", "test"]

STRUCTURES = ("disc", "cup")
"""The channels of a target: the disc with the cup in it, and the cup."""

DICE = dice_of(STRUCTURES)
"""Dice (%) of disc and cup of one photograph."""


def normalise(image: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
    """Stretch an image to [0, 1] by the minimum and maximum over all its channels together.

    A constant image has no contrast to stretch and becomes zeros.
    """
    low, high = image.amin(), image.amax()
    return (image - low) / torch.where(high > low, high - low, torch.ones_like(high))
