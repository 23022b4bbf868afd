"""Predictions integrated over mixtures of source and test statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import Distributions, entropies, log_distributions, to_logits
from gradkit.tta.objectives import Logits, Probabilities, check_probabilities, logits_of
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    PerChannel,
    Statistics,
    batch_moments,
    check_variance,
    source_moments,
)

Score = Literal["entropy", "balanced"]


class Interpolated(Statistics):
    """Statistics (1 − r)·source + r·test, with the test's measured once per batch; see `InTEnt`.

    The measuring pass normalises by the batch in every layer, and takes unbiased variances, as the
    authors' code does. There is no state between batches.

    Attributes:
        share: r, which `interpolate` sets before a pass.

    Examples:
        >>> layer = nn.Sequential(nn.BatchNorm1d(1))
        >>> statistics = Interpolated()
        >>> from gradkit.tta import install_statistics
        >>> _ = install_statistics(layer, statistics)
        >>> statistics.observe(layer, torch.tensor([[10.0], [20.0]]))
        >>> statistics.interpolate(0.5)  # source: 0 and 1; batch: 15 and 50
        >>> statistics.moments(layer[0], torch.zeros(1, 1))
        (tensor([7.5000]), tensor([25.5000]))
    """

    uses_source: ClassVar[bool] = True

    def __init__(self) -> None:
        self.share = 0.0
        # By layer: the moments of each call in the measuring pass, and the number of calls since.
        self._measured: dict[str, list[tuple[PerChannel, PerChannel]]] = {}
        self._calls: dict[str, int] = {}
        self._measuring = False

    def __repr__(self) -> str:
        return "Interpolated()"

    def interpolate(self, share: int | float) -> None:
        """Set r for the next pass."""
        self.share = float(share)
        self._calls = dict.fromkeys(self._measured, 0)

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The mixture; in the measuring pass the moments of `x`."""
        if self._measuring:
            mean, var = batch_moments(x)
            check_variance(layer.name, x)
            count = x.numel() // x.shape[1]
            self._measured.setdefault(layer.name, []).append((mean, var * (count / (count - 1))))
            return mean, var
        measured = self._measured[layer.name]
        call = self._calls[layer.name] % len(measured)
        self._calls[layer.name] += 1
        pairs = zip(source_moments(layer), measured[call], strict=True)
        mean, var = ((1 - self.share) * there + self.share * here for there, here in pairs)
        return mean, var

    def observe(self, model: nn.Module, images: Tensor) -> None:
        """Measure the test's statistics, in one pass."""
        self._measured, self._measuring = {}, True
        try:
            model(images)
        finally:
            self._measuring = False
        self.interpolate(self.share)


def balanced_entropy(p: Distributions) -> Float[Tensor, " batch"]:
    """Mean over outcomes of the mean entropy of the predictions of that outcome, in nats.

    A prediction's outcome is its most probable one: for sigmoids, whether p ≥ ½. Outcomes that are
    not predicted do not count.

    Examples:
        >>> p = torch.tensor([[0.5, 1.0, 0.0, 0.0]])  # one uncertain of two, none of two
        >>> balanced_entropy(torch.stack([p, 1 - p]).reshape(1, 1, 2, 4))  # (½·log 2 + 0) / 2
        tensor([0.1733])
    """
    h = entropies(p.log())
    predicted = p.argmax(dim=2, keepdim=True)
    each = torch.zeros_like(p).scatter(2, predicted, 1.0).movedim(2, 1).flatten(2)
    counts = each.sum(dim=2)
    means = (each * h.flatten(1).unsqueeze(1)).sum(dim=2) / counts.clamp_min(1)
    return means.sum(dim=1) / (counts > 0).sum(dim=1)


class Integration:
    """The mean of probabilities over mixtures of statistics, weighted by certainty; see `InTEnt`.

    The adapter's statistics must be `Interpolated`.

    Args:
        shares: The test's shares r.
        score: What the weights depend on; see `InTEnt`.
        probabilities: The meaning of the logits; see `TENT`.

    Attributes:
        facts: The "weights" [N, R] of the last batch.

    Raises:
        TypeError: If a share is no number.
        ValueError: If there is no share, or an argument has no valid value; or, when the adapter is
            made, if its statistics are others.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.PTBN(model, statistics=Interpolated(), predict=Integration())
        >>> adapter(torch.rand(2, 3, 8, 8)).shape, adapter.facts["weights"].shape
        (torch.Size([2, 2, 8, 8]), torch.Size([2, 6]))
    """

    def __init__(
        self,
        shares: Sequence[int | float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        score: Score = "entropy",
        probabilities: Probabilities = "auto",
    ) -> None:
        if not shares:
            raise ValueError("shares is empty; pass one share at least, such as (0.0, 0.5, 1.0)")
        for share in shares:
            check_number("shares", share, least=0, most=1)
        if score not in ("entropy", "balanced"):
            raise ValueError(f'score is {score!r}; choose "entropy" or "balanced"')
        check_probabilities(probabilities)
        self.shares, self.score, self.probabilities = tuple(shares), score, probabilities
        self.facts: dict[str, Tensor] = {}

    def attach(self, adapter: Adapter) -> None:
        """Take the adapter's statistics.

        Raises:
            ValueError: If their share cannot be changed.
        """
        if not isinstance(adapter.statistics, Interpolated):
            raise ValueError(
                f"predictions are integrated over shares of Interpolated statistics, but these are "
                f"{adapter.statistics}; pass statistics=gk.tta.Interpolated()"
            )
        self.statistics = adapter.statistics

    def __call__(self, model: nn.Module, images: Tensor) -> Logits:
        """The logits of the mean probabilities."""
        found, scores = [], []
        for share in self.shares:
            self.statistics.interpolate(share)
            logits = logits_of(model, images)
            log_p = log_distributions(logits, self.probabilities)
            found.append(log_p.exp())
            if self.score == "entropy":
                bound = math.log(log_p.shape[2])
                scores.append(1 - entropies(log_p).flatten(1).mean(dim=1) / bound)
            else:
                scores.append(-balanced_entropy(found[-1]))
        score = torch.stack(scores, dim=1)
        if self.score == "balanced":
            low, high = score.amin(dim=1, keepdim=True), score.amax(dim=1, keepdim=True)
            score = (score - low) / torch.where(high > low, high - low, 1.0)
        weights = score.softmax(dim=1)
        self.facts = {"weights": weights}
        stacked = torch.stack(found, dim=1)
        shaped = weights.reshape(*weights.shape, *[1] * (stacked.dim() - 2))
        return to_logits((shaped * stacked).sum(dim=1), self.probabilities, logits)


def InTEnt(  # noqa: N802 # the method's name
    model: nn.Module,
    shares: Sequence[int | float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    score: Score = "entropy",
    probabilities: Probabilities = "auto",
    **options: Any,
) -> Adapter:
    """Integrated entropy weighting (InTEnt, CVPR Workshops 2024).

    [Medical Image Segmentation with InTEnt: Integrated Entropy Weighting for Single Image Test-Time
    Adaptation](https://arxiv.org/abs/2402.09604):

        p_r = prediction with the statistics (1 − r)·source + r·test,   r = 0, 0.2, …, 1
        s_r = 1 − mean entropy of p_r, in units of its bound             "entropy"
        s_r = −mean over foreground and background of their mean entropy, scaled to [0, 1] over r
                                                                         "balanced"
        w   = softmax(s)
        p   = Σ_r w_r·p_r

    The test's statistics are measured in one pass of their own, with unbiased variances, as in the
    authors' code. Each image has its own weights. The result are the logits of p. With several
    classes "balanced" takes the mean over the predicted classes; the paper has one.

    Cost: 7 forward passes; no gradients. State: none.

    Args:
        model: The source model; see `Adapter`.
        shares: The test's shares r.
        score: What the weights depend on.
        probabilities: The meaning of the logits; see `TENT`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        TypeError: If a share is no number.
        ValueError: If an argument has no valid value, or if the model has no BatchNorm with running
            statistics.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.InTEnt(model)
        >>> logits = adapter(torch.rand(1, 3, 8, 8))
        >>> adapter.facts["weights"].shape
        torch.Size([1, 6])
    """
    return Adapter(
        model,
        statistics=Interpolated(),
        **{"predict": Integration(shares, score, probabilities), **options},
    )
