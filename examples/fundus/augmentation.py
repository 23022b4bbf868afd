"""Random variants of a training image and of its mask, kept in step.

The transformations are those of GraTa's source training; the mask follows every geometric one.
Its images are cropped round the disc, so a network could learn that the disc is in the centre;
a random shift, which the published training lacks, takes that away.
"""

from typing import Any

import numpy as np
from monai.transforms import (
    Compose,
    Rand2DElasticd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
)
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from examples.fundus.sample import normalise

IMAGE, TARGET = "image", "target"
BOTH = (IMAGE, TARGET)
MODES = ("bilinear", "nearest")  # a mask stays {0, 1}


def build_augmentation(size: int, mirror: bool = True) -> Compose:
    """The random transformations of a dictionary of `image` [3, S, S] and `target` [2, S, S].

    In order: shift by up to 15% of the side and, jointly with it, rotation by up to 15° and
    scale 0.75 to 1.25, each axis its own (p = 0.8); elastic deformation (p = 0.1); mirror along
    each axis (p = 0.5); brightness × U(0.7, 1.5), each channel its own (p = 0.15); Gaussian noise
    of standard deviation U(0, 0.1) (p = 0.15). Published are p = 0.1 for rotation and scale, and
    no shift. Beyond the border, image and mask continue with their outermost pixels: reflection
    would show a second disc.

    Args:
        size: side of the image, pixels.
        mirror: whether images are mirrored.
    """
    shift = 0.15 * size
    return Compose(
        [
            RandAffined(
                BOTH,
                prob=0.8,
                rotate_range=np.deg2rad(15),
                scale_range=(-0.25, 0.25),
                translate_range=(shift, shift),
                mode=MODES,
                padding_mode="border",
            ),
            Rand2DElasticd(
                BOTH,
                prob=0.1,
                spacing=(size / 4, size / 4),
                magnitude_range=(0.0, size / 32),
                mode=MODES,
                padding_mode="border",
            ),
            *(RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in (0, 1) if mirror),
            RandScaleIntensityd(IMAGE, factors=(-0.3, 0.5), prob=0.15, channel_wise=True),
            RandGaussianNoised(IMAGE, prob=0.15, std=0.1),
        ]
    )


class AugmentedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of image and target, transformed at random.

    The variant of a sample depends on nothing but (seed, epoch, index), so neither the order of
    access nor an interruption of the training changes it.

    Args:
        samples: the originals, square and of one size.
        seed: of the whole training.
        mirror: whether images are mirrored; not where the network is to tell how they lie.

    Attributes:
        epoch: set it before each pass over the data.
    """

    def __init__(self, samples: Dataset[Sample], seed: int, mirror: bool = True) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0
        self._augment = build_augmentation(samples[0].image.shape[-1], mirror)

    def __len__(self) -> int:
        return length(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.samples[index]
        # MONAI takes one 32-bit seed; SeedSequence mixes the three numbers into it.
        seed = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0]
        self._augment.set_random_state(seed=int(seed))
        varied: dict[str, Any] = self._augment({IMAGE: sample.image, TARGET: sample.target})
        # The reader stretches every image to [0, 1]; so must what the network is trained on be.
        return normalise(varied[IMAGE].as_tensor()), varied[TARGET].as_tensor()
