"""Images of the source as another camera might show them."""

import torch
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from gradkit.tta.augment import StrongAugmentation, minmax


class Shifted(Dataset[Sample]):
    """Each image several times, in brightness, contrast, gamma, noise and blur drawn at random.

    These are GraTa's strong augmentations, whose strengths differ between colours; labels stay. The
    variant depends on nothing but the seed and the index.

    Args:
        samples: the originals.
        draws: variants of each.
        seed: of the draws.
    """

    def __init__(self, samples: Dataset[Sample], draws: int, seed: int) -> None:
        self.samples, self.draws, self.seed = samples, draws, seed
        self._augment = StrongAugmentation()

    def __len__(self) -> int:
        return length(self.samples) * self.draws

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index // self.draws]
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + index)
        image = minmax(self._augment(sample.image.unsqueeze(0), generator))[0]
        return Sample(f"{sample.name}, {index % self.draws}", image, sample.target)
