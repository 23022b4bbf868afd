"""Batches of labelled and unlabelled images, each a function of the seed and the iteration."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from examples.common.drawing import uniform
from examples.common.frequency import mix_amplitude
from examples.semi.augmentation import cutmix_box, draw_grid, strengthen, warp
from examples.semi.data import Data


@dataclass(frozen=True)
class Batch:
    """What an iteration trains on; without unlabelled images for supervised training.

    Attributes:
        image: labelled images [n, c, h, w], weakly augmented, perhaps of another appearance.
        target: of these [n, s, h, w].
        weak: unlabelled images [m, c, h, w], weakly augmented; the teacher sees them.
        strong: strong variants of these; the student sees them.
        box: [m, 1, h, w], 1 where an image is to be replaced by its neighbour in the batch.
        iteration: counted from 0.
    """

    image: Float[Tensor, "n c h w"]
    target: Float[Tensor, "n s h w"]
    weak: Float[Tensor, "m c h w"]
    strong: Float[Tensor, "m c h w"]
    box: Float[Tensor, "m 1 h w"]
    iteration: int

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        tensors = (field.name for field in fields(self) if field.name != "iteration")
        moved = {name: getattr(self, name).to(device) for name in tensors}
        return Batch(**moved, iteration=self.iteration)


@dataclass(frozen=True)
class Batches:
    """Makes the batches of a training.

    Attributes:
        data: to draw from.
        seed: of all draws.
        labelled: images of a batch that are labelled.
        unlabelled: images of a batch that are not; 0 for supervised training.
        strong: range of the factors of brightness and contrast.
        cutmix: whether images are mixed with boxes of others.
        amplitude: whether labelled images take over the appearance of unlabelled ones, by up to
            iteration / iterations.
        iterations: of the whole training.
        size: side of the images, pixels.
    """

    data: Data
    seed: int
    labelled: int
    unlabelled: int
    strong: tuple[float, float]
    cutmix: bool
    amplitude: bool
    iterations: int
    size: int

    def between(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of the iterations from `start` on and before `stop`."""
        return map(self.make, range(start, min(stop, self.iterations)))

    def make(self, iteration: int) -> Batch:
        """The batch of one iteration."""
        seed = np.random.SeedSequence((self.seed, iteration)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        chosen = _draw(self.data.labelled, self.labelled, generator)
        grid = draw_grid(self.labelled, self.size, generator)
        image = warp(torch.stack([sample.image for sample in chosen]), grid)
        target = warp(torch.stack([sample.target for sample in chosen]), grid, "nearest")
        if self.unlabelled == 0:
            none = image[:0]
            return Batch(image, target, none, none, none[:, :1], iteration)
        others = _draw(self.data.unlabelled, self.unlabelled, generator)
        grid = draw_grid(self.unlabelled, self.size, generator)
        weak = warp(torch.stack([sample.image for sample in others]), grid)
        strong = torch.stack([strengthen(each, self.strong, generator) for each in weak])
        box = torch.stack([cutmix_box(self.size, generator) for _ in weak])
        degree = uniform(generator, 0, iteration / self.iterations, len(image))
        if self.amplitude:
            style = weak[torch.arange(len(image)) % len(weak)]
            image = mix_amplitude(image, style, degree.reshape(-1, 1, 1, 1), 2).clamp(0, 1)
        return Batch(image, target, weak, strong, box if self.cutmix else 0 * box, iteration)


def _draw(samples: Dataset[Sample], count: int, generator: torch.Generator) -> list[Sample]:
    """Random samples, each at most once as long as there are enough."""
    there = length(samples)
    rounds = [torch.randperm(there, generator=generator) for _ in range(-(-count // there))]
    return [samples[int(index)] for index in torch.cat(rounds)[:count]]
