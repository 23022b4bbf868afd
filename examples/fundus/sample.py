"""What every set of fundus photographs yields: an image and its nested masks."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Split = Literal["all", "train", "test"]


@dataclass(frozen=True)
class Sample:
    """One photograph and its segmentation.

    Attributes:
        name: Path of the image, relative to the root of its data.
        image: Red, green, blue in [0, 1], float32.
        target: The nested channels [disc with cup, cup], each 0 or 1, float32.
    """

    name: str
    image: Float[Tensor, "3 S S"]
    target: Float[Tensor, "2 S S"]


def normalise(image: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
    """Stretch an image to [0, 1] by the minimum and maximum over all its channels together.

    A constant image has no contrast to stretch and becomes zeros.
    """
    low, high = image.amin(), image.amax()
    return (image - low) / torch.where(high > low, high - low, torch.ones_like(high))
