"""What data sets of segmentations yield, and what torch's `Dataset` leaves undeclared."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Sample:
    """One image or volume and its segmentation.

    Attributes:
        name: What tells it from others, such as the path of its file from the root of the data.
        image: Its intensities, float32.
        target: A channel for each structure, 0 or 1, float32.
    """

    name: str
    image: Float[Tensor, "channels ..."]
    target: Float[Tensor, "structures ..."]


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
