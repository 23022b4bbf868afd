"""Prediction-time batch normalisation."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradkit.tta.adapter import Adapter
from gradkit.tta.statistics import Statistics


def PTBN(  # noqa: N802 # the method's name
    model: nn.Module, statistics: str | Statistics = "test", **options: Any
) -> Adapter:
    """Prediction-time batch normalisation ([Nado et al., 2020](https://arxiv.org/abs/2006.10963)).

    Mean and variance come from the present images; no weight changes, and there is no state. This
    is the baseline for every method that also trains with test statistics.

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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        >>> logits = gk.tta.PTBN(model)(torch.rand(1, 3, 8, 8))
        >>> logits.mean().abs() < 1e-6
        tensor(True)
    """
    return Adapter(model, statistics=statistics, **options)
