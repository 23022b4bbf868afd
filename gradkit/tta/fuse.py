"""Predictions under several statistics, averaged over views and fused class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import Distributions, log_distributions, to_logits
from gradkit.tta.objectives import (
    Logits,
    Model,
    Probabilities,
    check_probabilities,
    logits_of,
    logits_of_views,
    resolve_probabilities,
)
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    Mixed,
    PerChannel,
    Statistics,
    resolve_statistics,
)
from gradkit.tta.views import WEAK_VIEWS, View, check_views, identity

Candidates = Float[Tensor, "candidates batch classes *positions"]
Gate = Callable[[Tensor], Tensor]
"""From the candidates' probabilities [R, N, C, ...] to their weights [R, N, C]."""


class Alternatives(Statistics):
    """Several statistics, one of which is used at a time; see `Fuse`.

    Args:
        statistics: "source", "test" or a `Statistics` without state, of each.

    Attributes:
        index: The one that is used.

    Raises:
        ValueError: If there are none, or if one is unknown or keeps a state.

    Examples:
        >>> from gradkit.tta import install_statistics
        >>> statistics = Alternatives("source", Mixed(0.5))
        >>> layer = install_statistics(nn.BatchNorm1d(1), statistics)
        >>> statistics.index = 1
        >>> statistics.moments(layer, torch.tensor([[10.0], [20.0]]))
        (tensor([7.5000]), tensor([13.]))
    """

    def __init__(self, *statistics: str | Statistics) -> None:
        if not statistics:
            raise ValueError('there are no statistics; pass some, such as "source" and "test"')
        self.choices = tuple(map(resolve_statistics, statistics))
        for each in self.choices:
            if each.learns:
                raise ValueError(f"{each} learn from batches; choose statistics without a state")
        self.index = 0

    @property
    def uses_source(self) -> bool:  # type: ignore[override]  # a constant of most statistics
        return any(each.uses_source for each in self.choices)

    @classmethod
    def of_candidates(cls, statistics: Sequence[str | Statistics]) -> Alternatives:
        """Those of a sequence, one for each candidate.

        Raises:
            ValueError: If it is no sequence; see also `Alternatives`.

        Examples:
            >>> Alternatives.of_candidates(["source", Mixed(0.5)])
            Alternatives(SourceStatistics(), Mixed(share=0.5))
        """
        if isinstance(statistics, (str, Statistics)):
            raise ValueError(
                f"statistics are {statistics!r}, but each candidate needs its own: pass a "
                'sequence, such as ("source", gk.tta.Mixed(0.2))'
            )
        return cls(*statistics)

    def __repr__(self) -> str:
        return f"Alternatives({', '.join(map(repr, self.choices))})"

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """Those of the statistics in use."""
        return self.choices[self.index].moments(layer, x)

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """As the statistics in use do."""
        return self.choices[self.index].normalise(layer, x)


class Fusion:
    """The candidates' probabilities, averaged over views and mixed class by class; see `Fuse`.

    The adapter's statistics must be `Alternatives`.

    Args:
        weights: For each candidate its weight for each class; by default all alike.
        views: The views of the images; none for the images alone.
        image_share: The share of the image itself against the mean over views.
        gate: Chooses the weights for each image, instead of `weights`.
        probabilities: The meaning of the logits; see `TENT`.
        batched_views: Whether views take one forward pass together; see
            `gradkit.tta.objectives.logits_of_views`.

    Attributes:
        facts: The "weights" [R, N, C] of the last batch.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value, or both `weights` and `gate` are given; or,
            when the adapter is made, if its statistics are others; or, in a call, if there are
            other numbers of weights than of candidates and classes.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.PTBN(
        ...     model, statistics=Alternatives("source", "test"), predict=Fusion(views=())
        ... )
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.facts["weights"].shape
        (torch.Size([1, 2, 8, 8]), torch.Size([2, 1, 2]))
    """

    def __init__(
        self,
        weights: Sequence[Sequence[int | float]] | None = None,
        views: Sequence[View] = WEAK_VIEWS,
        image_share: int | float = 0.5,
        gate: Gate | None = None,
        probabilities: Probabilities = "auto",
        batched_views: bool = False,
    ) -> None:
        check_number("image_share", image_share, least=0, most=1)
        check_probabilities(probabilities)
        if weights is not None and gate is not None:
            raise ValueError("weights and gate are both given, and the gate replaces the weights")
        for candidate in weights or ():
            for weight in candidate:
                check_number("weights", weight, least=0, most=1)
        if weights is not None:
            for column, each in enumerate(zip(*weights, strict=True)):
                if abs(sum(each) - 1) > 1e-6:
                    raise ValueError(
                        f"the weights of class {column} are {list(each)}, with the sum "
                        f"{sum(each)}; those of all candidates must sum to 1"
                    )
        self.weights, self.views, self.image_share = weights, tuple(views), image_share
        self.gate, self.probabilities = gate, probabilities
        self.batched_views = batched_views
        self.facts: dict[str, Tensor] = {}

    def attach(self, adapter: Adapter) -> None:
        """Take the adapter's statistics.

        Raises:
            ValueError: If there are no alternatives among them.
        """
        if not isinstance(adapter.statistics, Alternatives):
            raise ValueError(
                f"candidates have statistics of their own, but these are {adapter.statistics}; "
                "pass statistics=gk.tta.Alternatives(...)"
            )
        self.statistics = adapter.statistics

    def check_images(self, images: Tensor) -> None:
        """Check that the views can be applied to these images.

        Raises:
            ValueError: If they cannot.
        """
        check_views(self.views, images)

    def __call__(self, model: Model, images: Tensor) -> Logits:
        """The logits of the fused probabilities."""
        found = []
        try:
            for index in range(len(self.statistics.choices)):
                self.statistics.index = index
                p, logits = self._candidate(model, images)
                found.append(p)
        finally:
            self.statistics.index = 0
        stacked = torch.stack(found)
        is_softmax = resolve_probabilities(self.probabilities, logits) == "softmax"
        by_class = stacked[:, :, 0] if is_softmax else stacked[:, :, :, 0]
        weights = self._weights(by_class)
        self.facts = {"weights": weights}
        shape = (*weights.shape[:2], *((1, -1) if is_softmax else (-1, 1)))
        shaped = weights.reshape(*shape, *[1] * (stacked.dim() - 4)).to(stacked)
        fused = (shaped * stacked).sum(dim=0)
        fused = fused / fused.sum(dim=2, keepdim=True)  # over classes with different weights
        return to_logits(fused, self.probabilities, logits)

    def _candidate(self, model: Model, images: Tensor) -> tuple[Distributions, Logits]:
        logits = logits_of(model, images)
        p = log_distributions(logits, self.probabilities).exp()
        if not self.views:
            return p, logits
        others = [view for view in self.views if view.forward is not identity]
        seen = [p] * (len(self.views) - len(others))
        for z in logits_of_views(model, images, others, self.batched_views):
            seen.append(log_distributions(z, self.probabilities).exp())
        share = self.image_share
        return share * p + (1 - share) * torch.stack(seen).mean(dim=0), logits

    def _weights(self, by_class: Candidates) -> Float[Tensor, "candidates batch classes"]:
        expected = by_class.shape[:3]
        if self.gate is not None:
            weights = self.gate(by_class)
        elif self.weights is not None:
            weights = by_class.new_tensor(self.weights).unsqueeze(1)
            if weights.dim() == 3 and weights.shape[::2] == expected[::2]:
                weights = weights.expand(expected)
        else:
            weights = by_class.new_full(expected, 1 / len(by_class))
        if weights.shape != expected:
            raise ValueError(
                f"the weights have shape {list(weights.shape)}, but there are {expected[0]} "
                f"candidates and {expected[2]} classes: give each candidate one weight for each "
                "class, and let a gate return [candidates, images, classes]"
            )
        return weights


def Fuse(  # noqa: N802 # named like the methods
    model: nn.Module,
    statistics: Sequence[str | Statistics] = ("source", Mixed(0.2)),
    weights: Sequence[Sequence[int | float]] | None = None,
    views: Sequence[View] = WEAK_VIEWS,
    image_share: int | float = 0.5,
    gate: Gate | None = None,
    probabilities: Probabilities = "auto",
    batched_views: bool = False,
    **options: Any,
) -> Adapter:
    """A composition without gradients: candidates under several statistics, fused class by class.

        u_r = ½·p_r(x) + ½·mean over views of view⁻¹(p_r(view(x)))     r: the source's statistics,
                                                                       and 0.8 of the test's
        p(c) = Σ_r w_r(x, c)·u_r(c)

    Classes may want different statistics: a large structure those of the image, a small one inside
    it a blend, whose candidates err differently. The weights w are constants for each class, or a
    gate's: a function of the candidates' probabilities [R, N, C, ...] that returns weights
    [R, N, C]. With softmax probabilities the result is scaled to the sum 1. This is no published
    method. Which weights are good depends on the task, and has to be found on other data than those
    on which it is reported; the default weighs all candidates alike.

    Cost: 12 forward passes, or 4 with `batched_views` on square images; no gradients. State: none.

    Args:
        model: The source model; see `Adapter`.
        statistics: Of each candidate.
        weights: For each candidate its weight for each class; each class's sum to 1.
        views: The views of the images; none for the images alone.
        image_share: The share of the image itself against the mean over views.
        gate: Chooses the weights for each image, instead of `weights`.
        probabilities: The meaning of the logits; see `TENT`.
        batched_views: Whether views are evaluated together, with each one's own statistics.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value, or if the statistics do not fit the model; in
            a call, if the numbers of weights do not fit.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Fuse(model, weights=((0.0, 0.6), (1.0, 0.4)))  # disc and cup
        >>> logits = adapter(torch.rand(1, 3, 8, 8))
        >>> adapter.facts["weights"][:, 0]
        tensor([[0.0000, 0.6000],
                [1.0000, 0.4000]])
    """
    fusion = Fusion(weights, views, image_share, gate, probabilities, batched_views)
    alternatives = Alternatives.of_candidates(statistics)
    return Adapter(model, statistics=alternatives, **{"predict": fusion, **options})
