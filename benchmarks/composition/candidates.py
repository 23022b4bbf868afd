"""The candidates of an image, computed once, from which every variant of the fusion is read."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit import tta
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    PerChannel,
    SourceStatistics,
    batch_moments,
    source_moments,
)

PASSES = 13
"""Forward passes for an image: six views under two kinds of statistics, and one of PTBN."""


class Watched(tta.Statistics):
    """The source's statistics; remembers how far those of the images are from them.

    The distance of a layer is the mean over its channels of |μ − μ_s|/σ_s + |log(σ/σ_s)|, with the
    layer's ε in the variances.

    Attributes:
        distances: of each layer that was called since the list was last replaced.
    """

    uses_source = True

    def __init__(self) -> None:
        self.distances: list[float] = []

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The layer's running mean and variance."""
        return source_moments(layer)

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """BatchNorm in evaluation mode."""
        source_mean, source_var = source_moments(layer)
        mean, var = batch_moments(x)
        source_deviation, deviation = (source_var + layer.eps).sqrt(), (var + layer.eps).sqrt()
        distance = (mean - source_mean).abs() / source_deviation
        distance = distance + (deviation / source_deviation).log().abs()
        self.distances.append(float(distance.mean()))
        return SourceStatistics().normalise(layer, x)


@dataclass(frozen=True)
class Candidates:
    """Probabilities of disc and cup of one image.

    Attributes:
        alone: of the image itself, under the statistics source, mixed:0.2 and test.
        viewed: u0 and u1: half of it, half the mean over the six views, under source and mixed:0.2.
        shift: mean over layers of the distance between the image's statistics and the source's.
    """

    alone: Float[Tensor, "3 2 height width"]
    viewed: Float[Tensor, "2 2 height width"]
    shift: float


class Predictor:
    """Computes the candidates of images.

    Args:
        model: the source model, which is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.watched = Watched()
        self.statistics = tta.Alternatives(self.watched, tta.Mixed(0.2), "test")
        copied = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        self.model = tta.install_statistics(copied, self.statistics)

    @torch.no_grad()
    def __call__(self, image: Float[Tensor, "channels side side"]) -> Candidates:
        """The candidates of one image, on the CPU."""
        images = image.unsqueeze(0)
        views = [view.forward(images) for view in tta.WEAK_VIEWS]
        self.watched.distances = []
        first = self._predict(0, views[:1])
        shift = sum(self.watched.distances) / len(self.watched.distances)
        # The source's statistics are the same for any batch; others are those of one view.
        first = torch.cat([first, self._predict(0, [torch.cat(views[1:])])])
        second = self._predict(1, views)
        test = self._predict(2, views[:1])
        viewed = []
        for predicted in (first, second):
            aligned = [view.inverse(p) for view, p in zip(tta.WEAK_VIEWS, predicted, strict=True)]
            viewed.append(0.5 * aligned[0] + 0.5 * torch.stack(aligned).mean(dim=0))
        alone = torch.stack([first[0], second[0], test[0]])
        return Candidates(alone.cpu(), torch.stack(viewed).cpu(), shift)

    def _predict(self, index: int, batches: Sequence[Tensor]) -> Float[Tensor, "views 2 side side"]:
        """Probabilities under statistics by their index, batch by batch."""
        self.statistics.index = index
        return torch.cat([torch.sigmoid(self.model(batch)) for batch in batches])
