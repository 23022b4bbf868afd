"""Running statistics that follow the test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    CountingStatistics,
    PerChannel,
    batch_moments,
    check_variance,
    source_moments,
)
from gradkit.tta.views import WEAK_VIEWS, View


class DynamicStatistics(CountingStatistics):
    """Running statistics that move towards each batch with a momentum that decays; see `DUA`.

    The running statistics themselves are the model's buffers; the state here is the number k of
    batches. A pass that learns normalises by the batch, as BatchNorm does in training. Moments of a
    layer that is called several times in it are averaged.

    Args:
        momentum: The momentum before the first batch.
        decay: ω.
        least: ζ, the momentum's lower bound.
        views: The views of the images that a pass sees; those that change the images' shape are
            left out.

    Attributes:
        facts: The "momentum" of the last batch.

    Raises:
        TypeError: If a number is none.
        ValueError: If a number is not between 0 and 1, if momentum and bound exceed 1 together, or
            if there is no view.

    Examples:
        >>> statistics = DynamicStatistics()
        >>> [round(statistics.momentum_of(k), 4) for k in (1, 2, 3)]
        [0.099, 0.0934, 0.0881]
    """

    uses_source: ClassVar[bool] = True

    def __init__(
        self,
        momentum: int | float = 0.1,
        decay: int | float = 0.94,
        least: int | float = 0.005,
        views: Sequence[View] = WEAK_VIEWS,
    ) -> None:
        for name, value in (("momentum", momentum), ("decay", decay), ("least", least)):
            check_number(name, value, least=0, most=1)
        check_number("momentum + least", momentum + least, most=1)
        if not views:
            raise ValueError("views is empty; pass one view at least, such as gk.tta.WEAK_VIEWS[0]")
        self.momentum, self.decay, self.least = momentum, decay, least
        self.views = tuple(views)
        self.facts: dict[str, float] = {}
        # Of a pass that learns: each layer's moments, of each call.
        self._seen: dict[str, list[tuple[PerChannel, PerChannel]]] | None = None

    def __repr__(self) -> str:
        return (
            f"DynamicStatistics(momentum={self.momentum}, decay={self.decay}, least={self.least})"
        )

    def momentum_of(self, k: int) -> float:
        """m_k = momentum·decay^k + least, the weight of the k-th batch."""
        return float(self.momentum * self.decay**k + self.least)

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The running statistics; in a pass that learns, those of `x`."""
        if self._seen is None:
            return source_moments(layer)
        mean, var = batch_moments(x)
        check_variance(layer.name, x)
        count = x.numel() // x.shape[1]
        unbiased = var * (count / (count - 1))
        self._seen.setdefault(layer.name, []).append((mean, unbiased))
        return mean, var

    def observe(self, model: nn.Module, images: Tensor) -> None:
        """Learn from the views of a batch, in one pass; nothing, if a moment is not finite."""
        views = [view.forward(images) for view in self.views]
        seen = self._seen = {}
        try:
            model(torch.cat([view for view in views if view.shape == images.shape]))
        finally:
            self._seen = None
        moments = {
            name: tuple(torch.stack(each).mean(dim=0) for each in zip(*calls, strict=True))
            for name, calls in seen.items()
        }
        if not _all_finite([each for pair in moments.values() for each in pair]):
            return  # nothing could be predicted ever after
        self.k += 1
        self.facts = {"momentum": self.momentum_of(self.k)}
        layers: dict[str, Any] = dict(model.named_modules())
        for name, (means, variances) in moments.items():
            layer = layers[name]
            layer.running_mean.lerp_(means.to(layer.running_mean), self.momentum_of(self.k))
            layer.running_var.lerp_(variances.to(layer.running_var), self.momentum_of(self.k))


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return not tensors or bool(torch.stack([each.isfinite().all() for each in tensors]).all())


def DUA(  # noqa: N802 # the method's name
    model: nn.Module,
    momentum: int | float = 0.1,
    decay: int | float = 0.94,
    least: int | float = 0.005,
    views: Sequence[View] = WEAK_VIEWS,
    **options: Any,
) -> Adapter:
    """Dynamic unsupervised adaptation ([Mirza et al., CVPR 2022](https://arxiv.org/abs/2112.00463)).

        m_k = 0.1·0.94^k + 0.005                                 k = 1, 2, …, one per batch
        μ ← (1 − m_k)·μ + m_k·μ_batch                            in every BatchNorm
        v ← (1 − m_k)·v + m_k·v_batch                            v_batch unbiased
        predict x with μ, v

    μ_batch and v_batch are over views of the images. The authors' code takes 64 random crops and
    mirrorings of one image; here they are the six weak views (those of the image's shape: four of
    an image that is not square). Their script reports the best of all iterations by test error,
    which uses labels; here the prediction is that of the present batch.

    Cost: 1 forward pass on all views at once and 1 on the images; no gradients. State: the running
    statistics and k.

    Args:
        model: The source model; see `Adapter`.
        momentum: The momentum before the first batch.
        decay: Its decay per batch.
        least: Its lower bound.
        views: The views of the images.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value, or if the model has no BatchNorm with running
            statistics.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.DUA(model)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.statistics.k
        (torch.Size([1, 2, 8, 8]), 1)
    """
    statistics = DynamicStatistics(momentum, decay, least, views)
    return Adapter(model, statistics=statistics, **options)
