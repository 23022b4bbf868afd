"""What data sets of segmentations yield, and what torch's `Dataset` leaves undeclared."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Sample:
    """One image or volume and its segmentation.

    Attributes:
        name: What tells it from others, such as the path of its file from the root of the data.
        image: Its intensities, float32.
        target: A channel for each structure, 0 or 1, float32; NaN throughout where there are no
            labels, so that no loss or score of them could go unnoticed.
    """

    name: str
    image: Float[Tensor, "channels ..."]
    target: Float[Tensor, "structures ..."]

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return not self.target.isnan().any()


def length(dataset: Dataset[Any]) -> int:
    """The number of samples of a dataset that can be indexed.

    Every such dataset has one, but torch declares it in no type.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> length(TensorDataset(torch.zeros(3, 2)))
        3
    """
    return len(dataset)  # type: ignore[arg-type]  # `Dataset` declares no __len__


HELD_OUT = 0.2  # share of what is to be trained on that chooses the best weights


def split_held_out(count: int, seed: int, unit: str = "image") -> tuple[list[int], list[int]]:
    """Splits 0 … count−1 at random into indices for training and a fifth for validation.

    Args:
        count: at least 2.
        seed: of the split.
        unit: what a sample is called, in the singular.

    Raises:
        ValueError: there are fewer than two.

    Example:
        >>> [len(part) for part in split_held_out(10, seed=0)]
        [8, 2]
    """
    if count < 2:
        raise ValueError(f"there is {count} {unit}(s) to train on; training needs at least 2")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(HELD_OUT * count))
    return sorted(order[held_out:]), sorted(order[:held_out])


@dataclass(frozen=True)
class Fingerprint:
    """What tells a training's data from other data, wherever their folder is.

    Attributes:
        root: kind of data root, `synthetic` or `folder`.
        count: number of images.
        names: SHA-256 of the images' names, in their order.
    """

    root: str
    count: int
    names: str

    def __str__(self) -> str:
        return f"{self.root}, {self.count} image(s), SHA-256 of their names {self.names[:8]}…"


def fingerprint(samples: Dataset[Sample], root: str) -> Fingerprint:
    """The fingerprint of samples from a kind of data root.

    Example:
        >>> import torch
        >>> samples = [Sample("a.png", torch.rand(3, 8, 8), torch.zeros(2, 8, 8))]
        >>> str(fingerprint(samples, "folder"))
        'folder, 1 image(s), SHA-256 of their names cc8441e8…'
    """
    count = length(samples)
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(samples[index].name.encode() + b"\0")  # a byte that no path can contain
    return Fingerprint(root, count, digest.hexdigest())
