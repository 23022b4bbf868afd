"""Random patches of volumes for training, half of them round aneurysms."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from examples.aneurysm.augmentation import IMAGE, TARGET, build_geometry, vary
from examples.aneurysm.data import to_label
from examples.common.datasets import Sample, length

Patch: TypeAlias = dict[str, Tensor]
"""Views of a patch by name [1, P, P, P], and its `label` [P, P, P]."""

Views: TypeAlias = Callable[[Tensor, Callable[[], Tensor], np.random.Generator], Patch]
"""Makes a method's views of a patch from its image, a patch of another centre, and randomness."""


class PatchDataset(Dataset[Patch]):
    """The patches of an epoch.

    A patch depends on nothing but (seed, rank, epoch, index), so neither workers nor an
    interruption of the training change it. First a centre is drawn, then one of its volumes, so
    that centres weigh the same; with probability `foreground` the patch is round a voxel of an
    aneurysm, a quarter of its side off at most, else anywhere.

    Args:
        centres: The volumes of each centre.
        side: Of a patch, voxels. Smaller volumes are padded.
        count: Patches of an epoch.
        foreground: Share of patches round an aneurysm.
        views: Of the method that is trained.
        seed: Of the whole training.
        rank: Of the process; each draws its own patches.

    Attributes:
        epoch: Set it before each pass.
    """

    def __init__(
        self,
        centres: Sequence[Dataset[Sample]],
        side: int,
        count: int,
        foreground: float,
        views: Views,
        seed: int,
        rank: int = 0,
    ) -> None:
        self.centres, self.side, self.count = centres, side, count
        self.foreground, self.views = foreground, views
        self.seed, self.rank, self.epoch = seed, rank, 0
        self._geometry = build_geometry()
        self._voxels: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Patch:
        entropy = (self.seed, self.rank, self.epoch, index)
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        centre = int(rng.integers(len(self.centres)))
        image, target = self._crop(centre, rng)
        varied = vary(self._geometry, {IMAGE: image, TARGET: target}, int(rng.integers(2**31)))

        def other() -> Tensor:
            others = [k for k in range(len(self.centres)) if k != centre] or [centre]
            return self._crop(others[int(rng.integers(len(others)))], rng)[0]

        patch = self.views(varied[IMAGE], other, rng)
        return {**patch, "label": to_label(varied[TARGET])}

    def _crop(self, centre: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A patch of a random volume of a centre: image and target."""
        case = int(rng.integers(length(self.centres[centre])))
        sample = self.centres[centre][case]
        space = sample.image.shape[1:]
        if rng.random() < self.foreground:
            voxels = self._foreground(centre, case, sample)
            middle = voxels[int(rng.integers(len(voxels)))].numpy()
            middle = middle + rng.integers(-(self.side // 4), self.side // 4 + 1, 3)
        else:
            middle = rng.integers(0, space)
        corner = [
            int(np.clip(m - self.side // 2, 0, max(0, n - self.side)))
            for m, n in zip(middle, space, strict=True)
        ]
        window = (slice(None), *(slice(c, c + self.side) for c in corner))
        image, target = sample.image[window], sample.target[window]
        missing = [self.side - n for n in image.shape[1:]]
        padding = [pad for m in reversed(missing) for pad in (m // 2, m - m // 2)]
        return (
            F.pad(image, padding, value=sample.image.min().item()),
            F.pad(target, padding),
        )

    def _foreground(self, centre: int, case: int, sample: Sample) -> Tensor:
        """Voxels of aneurysms; of vessels, or all, where there are none."""
        if (centre, case) not in self._voxels:
            masks = (sample.target[1], sample.target[0], torch.ones_like(sample.target[0]))
            mask = next(each for each in masks if each.any())
            self._voxels[centre, case] = mask.nonzero()
        return self._voxels[centre, case]
