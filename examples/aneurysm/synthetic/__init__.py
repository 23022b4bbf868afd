"""Synthetic multi-centre rotational angiograms (3DRA) with exact labels of vessel and aneurysm.

No image of a patient is needed to run the example: a vessel tree with aneurysms is drawn in mm, and
then imaged by a centre's angiograph. Centres differ in both their patients and their angiograph, so
that a network trained at some of them degrades at another.

The anatomy does not depend on the number of voxels; the noise does. It is a phantom, and not a
simulation of X-rays: beam hardening, for one, is drawn and not computed.
"""

import zlib

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from examples.aneurysm.synthetic.anatomy import grow, label
from examples.aneurysm.synthetic.angiograph import acquire
from examples.aneurysm.synthetic.centres import CENTRES, Centre
from examples.common.datasets import Sample

__all__ = ["CENTRES", "Centre", "SyntheticAngiograms", "angiogram"]


def angiogram(
    centre: Centre, generator: torch.Generator, size: int
) -> tuple[Float[Tensor, "1 S S S"], Float[Tensor, "2 S S S"]]:
    """Draws one patient of a centre and images the patient there.

    Args:
        centre: Whose patient, and whose angiograph.
        generator: Source of randomness.
        size: Side of the cubic volume, voxels.

    Returns:
        The volume in the centre's grey levels, and the masks of vessel and aneurysm. The first axis
        runs along the head.
    """
    anatomy = grow(centre, generator)
    vessels, sacs = anatomy.rasterise(size, centre.field_of_view)
    image = acquire(anatomy, vessels, sacs, centre, generator)
    return image[None], label(vessels, sacs).float()


class SyntheticAngiograms(Dataset[Sample]):
    """Synthetic angiograms of one centre, drawn when asked for and then kept.

    A patient depends on the seed, the centre and the number alone: not on the order of access or
    the length.

    Args:
        centre: A name from `CENTRES`.
        length: Number of volumes.
        size: Side of the cubic volumes, voxels, at least 8.
        seed: Seed of the whole data set.

    Raises:
        ValueError: If the centre is unknown, or length or size is too small.
    """

    def __init__(self, centre: str, length: int, size: int = 64, seed: int = 0) -> None:
        if centre not in CENTRES:
            raise ValueError(f"no synthetic centre {centre!r}; choose from {', '.join(CENTRES)}")
        if length < 1 or size < 8:
            raise ValueError(
                f"length must be at least 1 and size at least 8, not {length} and {size}"
            )
        self.centre, self.length, self.size, self.seed = centre, length, size, seed
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is outside {self.length} volumes")
        patient = index % self.length
        if patient not in self._drawn:
            # The step is odd, so the patients of one centre have different seeds for certain.
            start = zlib.crc32(f"{self.centre}/{self.seed}".encode())
            generator = torch.Generator().manual_seed((start + 0x9E3779B1 * patient) % 2**32)
            image, target = angiogram(CENTRES[self.centre], generator, self.size)
            name = f"{self.centre}/{patient:03d}"
            self._drawn[patient] = Sample(name, image, target)
        sample = self._drawn[patient]
        # Copies: what a caller does to its volume is not seen by the next one.
        return Sample(sample.name, sample.image.clone(), sample.target.clone())
