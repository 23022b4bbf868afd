"""The baseline without adaptation."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradkit.tta.adapter import Adapter
from gradkit.tta.statistics import Statistics


def NoAdapt(  # noqa: N802 # the method's name
    model: nn.Module, statistics: str | Statistics = "source", **options: Any
) -> Adapter:
    """The unchanged source model, in evaluation mode.

    Cost: 1 forward pass per batch.

    Args:
        model: The source model; see `Adapter`.
        statistics: Where mean and variance come from; see `Adapter`.
        **options: Further arguments of `Adapter`, such as `predict`.

    Returns:
        The adapter.

    Raises:
        ValueError: If the statistics do not fit the model.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> images = torch.rand(1, 3, 8, 8)
        >>> torch.equal(gk.tta.NoAdapt(model)(images), model(images))
        True
    """
    return Adapter(model, statistics=statistics, **options)
