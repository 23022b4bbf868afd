"""A memory of test images that stays recent, certain and balanced over classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_count


@dataclass(frozen=True)
class _Entry:
    image: Tensor
    uncertainty: float
    since: int
    """The number of images that had been offered before."""


class BalancedMemory:
    """The memory of [RoTTA](https://arxiv.org/abs/2303.13899): category-balanced sampling.

    Each image is offered with its predicted class and an uncertainty u in [0, 1]. The memory holds
    N images, and aims at N/C of each of C classes. Where there is room for the class, the image is
    taken. Otherwise it competes with the images of its own class, or, if its class has fewer than
    N/C, with those of the largest classes: the one of them with the largest score

        s = 1/(1 + e^(−age/N)) + u                     age: how many images were offered since

    makes place, if its score exceeds the new image's, ½ + u. With one class this is a memory of
    recent and certain images.

    State: the images, their classes, uncertainties and ages.

    Args:
        size: N.
        classes: C.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If one is less than 1.

    Examples:
        >>> memory = BalancedMemory(size=2, classes=2)
        >>> for value, label in enumerate((0, 0, 1)):
        ...     memory.offer(torch.tensor(float(value)), label, uncertainty=0.2 * value)
        >>> memory.images(), memory.ages()  # the second has a class without room, and is uncertain
        (tensor([0., 2.]), tensor([1.5000, 0.5000]))
    """

    def __init__(self, size: int, classes: int = 1) -> None:
        check_count("size", size)
        check_count("classes", classes)
        self.size = size
        self.offered = 0
        self.entries: list[list[_Entry]] = [[] for _ in range(classes)]

    def __len__(self) -> int:
        return sum(map(len, self.entries))

    @property
    def shape(self) -> torch.Size | None:
        """The images' shape; None if there are none."""
        return next((entry.image.shape for of in self.entries for entry in of), None)

    def offer(self, image: Tensor, label: int, uncertainty: float) -> None:
        """Take an image, if it is better than those whose place it could have."""
        own, count = self.entries[label], len(self.entries)
        if len(own) * count < self.size:
            largest = max(map(len, self.entries))
            rivals = [each for each in self.entries if len(each) == largest]
            taken = len(self) < self.size or self._makes_place(rivals, uncertainty)
        else:
            taken = self._makes_place([own], uncertainty)
        if taken:
            own.append(_Entry(image, uncertainty, self.offered))
        self.offered += 1

    def _makes_place(self, rivals: list[list[_Entry]], uncertainty: float) -> bool:
        """Remove the rival with the largest score, the latest of several, if it exceeds."""
        score, i, j = max(
            (self._score(entry), i, j) for i, of in enumerate(rivals) for j, entry in enumerate(of)
        )
        if score <= 0.5 + uncertainty:
            return False
        del rivals[i][j]
        return True

    def _score(self, entry: _Entry) -> float:
        age = (self.offered - entry.since) / self.size
        return 1 / (1 + math.exp(-age)) + entry.uncertainty

    def images(self) -> Float[Tensor, "entries ..."]:
        """The images, class by class, the oldest first."""
        return torch.stack([entry.image for of in self.entries for entry in of])

    def ages(self) -> Float[Tensor, " entries"]:
        """Their ages, in units of N."""
        ages = [self.offered - entry.since for of in self.entries for entry in of]
        return torch.tensor(ages, dtype=torch.float32) / self.size

    def state_dict(self) -> dict[str, Any]:
        """Images, uncertainties and the times when they were taken, of each class."""
        return {
            "offered": self.offered,
            "entries": [
                [(entry.image, entry.uncertainty, entry.since) for entry in of]
                for of in self.entries
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.offered = state_dict["offered"]
        self.entries = [[_Entry(*entry) for entry in of] for of in state_dict["entries"]]
