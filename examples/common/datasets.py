"""What torch's `Dataset` leaves undeclared."""

from typing import Any

from torch.utils.data import Dataset


def length(dataset: Dataset[Any]) -> int:
    """The number of samples of a dataset that can be indexed.

    Every such dataset has one, but torch declares it in no type.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> length(TensorDataset(torch.zeros(3, 2)))
        3
    """
    return len(dataset)  # type: ignore[arg-type]
