"""Marginal entropy minimisation with one image."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import entropies, log_distributions
from gradkit.tta.objectives import (
    Image,
    Model,
    Probabilities,
    Scalar,
    check_probabilities,
    logits_of_views,
)
from gradkit.tta.statistics import Mixed, Statistics
from gradkit.tta.views import WEAK_VIEWS, View, check_views


class MarginalEntropy:
    """The entropy of the mean prediction over views, with gradients through all; see `MEMO`.

    Args:
        views: The views of the images.
        probabilities: The meaning of the logits; see `TENT`.
        batched_views: Whether views take one forward and one backward pass together; see
            `gradkit.tta.objectives.logits_of_views`.

    Raises:
        ValueError: If there is no view, or `probabilities` has no valid value.

    Examples:
        >>> objective = MarginalEntropy()
        >>> objective(lambda images: images, torch.zeros(1, 1, 4, 4))  # log 2
        tensor(0.6931)
    """

    def __init__(
        self,
        views: Sequence[View] = WEAK_VIEWS,
        probabilities: Probabilities = "auto",
        batched_views: bool = False,
    ) -> None:
        if not views:
            raise ValueError("views is empty; pass one view at least, such as gk.tta.WEAK_VIEWS[0]")
        check_probabilities(probabilities)
        self.views, self.probabilities = tuple(views), probabilities
        self.batched_views = batched_views

    def check_images(self, images: Tensor) -> None:
        """Check that the views can be applied to these images.

        Raises:
            ValueError: If they cannot.
        """
        check_views(self.views, images)

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss."""
        predictions = [
            log_distributions(logits, self.probabilities)
            for logits in logits_of_views(model, image, self.views, self.batched_views)
        ]
        log_mean = torch.stack(predictions).logsumexp(dim=0) - math.log(len(self.views))
        return entropies(log_mean).mean()


def MEMO(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 2.5e-4,
    statistics: str | Statistics = Mixed(16 / 17),  # noqa: B008 # immutable
    views: Sequence[View] = WEAK_VIEWS,
    probabilities: Probabilities = "auto",
    batched_views: bool = False,
    **options: Any,
) -> Adapter:
    """Marginal entropy minimisation with one test point (MEMO, NeurIPS 2022).

    [MEMO: Test Time Robustness via Adaptation and Augmentation](https://arxiv.org/abs/2110.09506),
    with θ all weights:

        p̄ = mean over views of p(view(x); θ)          each mapped back
        θ ← θ_source − lr·∇H(p̄)                       one step, anew for each batch
        predict x with θ

    Statistics are 16 parts of the source's and one of the present images', the authors' for single
    images. They take 64 AugMix augmentations of an image, which belong to classifiers; here these
    are the six weak views, which can be undone on a segmentation. Pass `views` for others; a view's
    inverse is not applied to a classifier's logits. Here each view is normalised on its own, and
    there is no weight decay.

    Cost: 7 forward passes and 6 backward passes per batch, and the memory of six passes; with
    `batched_views` those of the views are one each, or two if images are not square. State: none.

    Args:
        model: The source model; see `Adapter`.
        lr: The learning rate of SGD; the authors' for ResNet-50.
        statistics: Where mean and variance come from; see `Adapter`. A model without BatchNorm
            takes "source".
        views: The views of the images. Pass others for a classifier, if flips or quarter turns may
            change the class.
        probabilities: The meaning of the logits; see `TENT`.
        batched_views: Whether views are evaluated together, with each one's own statistics.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.MEMO(model)
        >>> images = torch.rand(1, 3, 8, 8)
        >>> torch.equal(adapter(images), adapter(images))  # nothing is kept
        True
    """
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": MarginalEntropy(views, probabilities, batched_views)},
        **{
            "optimizer": functools.partial(torch.optim.SGD, lr=lr),
            "parameters": nn.Module.parameters,
            "episodic": True,
            **options,
        },
    )
