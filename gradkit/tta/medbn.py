"""Normalisation by medians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gradkit.tta.adapter import Adapter
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    PerChannel,
    Statistics,
    at_least_float32,
)


@dataclass(frozen=True)
class Median(Statistics):
    """The current batch's median, and the mean square about it; see `MedBN`.

    The median of an even number of values is the lower one. Gradients flow through both.

    Examples:
        >>> import torch
        >>> from gradkit.tta import install_statistics
        >>> layer = install_statistics(nn.BatchNorm1d(1), Median())
        >>> x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
        >>> layer.statistics.moments(layer, x)  # (1 + 0 + 16 + 64) / 4
        (tensor([1.]), tensor([20.2500]))
    """

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """Median and mean square about it, of each channel over N·H·W."""
        values = at_least_float32(x).transpose(0, 1).flatten(1)
        median = values.median(dim=1).values
        return median, (values - median[:, None]).square().mean(dim=1)


def MedBN(model: nn.Module, **options: Any) -> Adapter:  # noqa: N802 # the method's name
    """Median batch normalisation ([Park et al., CVPR 2024](https://arxiv.org/abs/2403.19326)).

        η = median of x over N·H·W          per channel; of an even number of values, the lower
        v = mean of (x − η)² over N·H·W
        y = γ·(x − η)/√(v + ε) + β

    Published as a defence against malicious images in a batch. Two files of the authors' code
    divide the sum of squares by different numbers, N·H·W and N; the former is a variance, and is
    taken here. To train with these statistics, pass `statistics=gk.tta.Median()` to another
    method.

    Cost: 1 forward pass. State: none.

    Args:
        model: The source model; see `Adapter`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        ValueError: If the model has no BatchNorm.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> logits = gk.tta.MedBN(model)(torch.rand(1, 3, 8, 8))
        >>> logits.flatten(2).median(dim=2).values.abs() < 1e-6
        tensor([[True, True]])
    """
    return Adapter(model, statistics=Median(), **options)
