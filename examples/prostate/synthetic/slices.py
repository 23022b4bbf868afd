"""Synthetic multi-site slices of the prostate with exact masks of the whole gland.

No image of a patient is needed to run the example. A slice is drawn as anatomy (gland with zones,
nodules and capsule, bladder, rectum, muscles, bones, fat), then acquired by a site's scanner (coil,
contrast, resolution, noise, window). Sites differ in their patients and in their scanners, so that
a network trained at one degrades at the others. It is a drawing, not a simulation of spins.
"""

import zlib

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample
from examples.prostate.synthetic.anatomy import draw_slice
from examples.prostate.synthetic.patient import draw_patient
from examples.prostate.synthetic.scanner import acquire
from examples.prostate.synthetic.sites import SITES

SLICES = 12
"""Slices of an examination, from apex to base."""


class SyntheticProstate(Dataset[Sample]):
    """Synthetic slices of one site, drawn when asked for.

    Slices come case by case, from apex to base. A slice depends on the seed, the site, its case and
    its number alone: not on the order of access, the size or the length. Training and test split
    share no case.

    Args:
        site: A name from `SITES`.
        split: "train" or "test".
        length: Number of slices.
        size: Side of the square images in pixels.
        seed: Seed of the whole data set.

    Raises:
        ValueError: If the site or split is unknown, or length or size is too small.
    """

    def __init__(self, site: str, split: str, length: int, size: int = 128, seed: int = 0) -> None:
        if site not in SITES:
            raise ValueError(f"no synthetic site {site!r}; choose from {', '.join(SITES)}")
        if split not in ("train", "test"):
            raise ValueError(f"split is 'train' or 'test', not {split!r}")
        if length < 1 or size < 16:
            raise ValueError(
                f"length must be at least 1 and size at least 16, not {length} and {size}"
            )
        self.site, self.split, self.length = site, split, length
        self.size, self.seed = size, seed
        self._drawn: dict[int, tuple[str, UInt8[Tensor, "1 S S"], UInt8[Tensor, "1 S S"]]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        index = range(self.length)[index]  # counts from the end where negative
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        name, pixels, mask = self._drawn[index]
        return Sample(name, pixels.float() / 255, mask.float())

    def _draw(self, index: int) -> tuple[str, Tensor, Tensor]:
        case, number = divmod(index, SLICES)
        case = 2 * case + (self.split == "test")  # odd cases are for testing
        site = SITES[self.site]
        patient = draw_patient(site, self._generator(f"{case}"))
        generator = self._generator(f"{case}/{number}")
        height = -0.92 + 1.84 * (number + 0.5) / SLICES
        signal, mask = draw_slice(patient, site, height, generator, self.size)
        image = acquire(signal, patient, site, generator)
        name = f"{self.site}/{self.split}/image/{case:02d}_{number:02d}.png"
        # 256 levels of grey, as a picture on disk has.
        return name, (image[None] * 255).round().byte(), mask[None].byte()

    def _generator(self, what: str) -> torch.Generator:
        seed = zlib.crc32(f"prostate/{self.site}/{self.seed}/{what}".encode())
        return torch.Generator().manual_seed(seed)
