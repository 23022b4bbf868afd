"""Reliable and sharpness-aware entropy minimisation at test time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.sharpness import SAM
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import entropies, log_distributions, threshold_of
from gradkit.tta.objectives import Image, Model, Probabilities, check_probabilities, logits_of
from gradkit.tta.restore import RestartBelow
from gradkit.tta.statistics import Statistics, norm_affine_parameters

IMAGENET_RATIO = 0.2 / (0.4 * math.log(1000))
"""SAR's literal restart threshold, in units of its entropy threshold for ImageNet's classes."""


class ReliableEntropy:
    """Mean entropy of the predictions that are certain enough; see `SAR`.

    A prediction is an image's for a classifier, a pixel's for dense softmax logits, and a pixel's
    of one class for sigmoids. Within a step, further evaluations keep only predictions that the
    first one has kept, too. If none is kept, the objective abstains.

    Args:
        threshold: Entropies below it are kept, in nats; by default 0.4·ln K for K outcomes (2 for
            sigmoids).
        probabilities: The meaning of the logits; see `TENT`.

    Attributes:
        last: The last value.
        limit: The threshold at the last evaluation.
        facts: The share of predictions that the last evaluation has kept, "kept".

    Raises:
        TypeError: If the threshold is no number.
        ValueError: If the threshold is not positive, or `probabilities` has no valid value.

    Examples:
        >>> objective = ReliableEntropy()
        >>> unsure = lambda images: torch.zeros(2, 3)
        >>> objective(unsure, torch.rand(2, 3, 8, 8)) is None
        True
    """

    def __init__(
        self, threshold: int | float | None = None, probabilities: Probabilities = "auto"
    ) -> None:
        if threshold is not None:
            check_number("entropy_threshold", threshold, above=0, finite=False)
        check_probabilities(probabilities)
        self.threshold, self.probabilities = threshold, probabilities
        self.last: Tensor | None = None
        self.limit = math.inf if threshold is None else float(threshold)
        self.facts: dict[str, Tensor] = {}
        self._first: Bool[Tensor, "*outcomes"] | None = None

    def begin_step(self, images: Tensor) -> None:
        """Forget what the last step has kept."""
        self._first = None

    def __call__(self, model: Model, image: Image) -> Tensor | None:
        """The loss, or None if nothing is kept."""
        log_p = log_distributions(logits_of(model, image), self.probabilities)
        h = entropies(log_p)
        self.limit = threshold_of(log_p) if self.threshold is None else self.threshold
        kept = h.detach() < self.limit
        if self._first is None:
            self._first = kept
        else:
            kept = kept & self._first
        self.facts = {"kept": kept.float().mean()}
        if not kept.any():
            return None
        loss = h[kept].mean()
        self.last = loss.detach()
        return loss


def SAR(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 2.5e-4,
    statistics: str | Statistics = "test",
    rho: float = 0.05,
    entropy_threshold: int | float | None = None,
    reset_threshold: int | float | Literal["scaled"] = 0.2,
    excluded: Sequence[str] = ("layer4", "blocks.9", "blocks.10", "blocks.11"),
    probabilities: Probabilities = "auto",
    **options: Any,
) -> Adapter:
    """Sharpness-aware and reliable entropy minimisation (SAR, ICLR 2023).

    [Towards Stable Test-Time Adaptation in Dynamic Wild World](https://arxiv.org/abs/2302.12400),
    with φ the scales and shifts of normalisation layers and E₀ = 0.4·ln K for K outcomes:

        g  = ∇ mean of H over predictions with H < E₀            at φ
        φ' = φ + ρ·g/‖g‖
        g  = ∇ mean of H over those of them with H < E₀ still     at φ', value ℓ
        φ  ← φ − SGD(g)                                           lr, momentum 0.9
        e  ← 0.9·e + 0.1·ℓ;   if e < reset_threshold: φ and the momentum back to the source

    For sigmoids each pixel of each class is a prediction with two outcomes (E₀ = 0.277). If nothing
    is kept, at φ or φ', no step is taken (`last_step.applied` is False). The authors' threshold of
    0.2 is for ImageNet; on images of few classes it restarts after nearly every step. "scaled"
    takes the same share of E₀ as 0.2 is for 1000 classes, 0.0724·E₀. The authors leave out the last
    blocks of ResNets and vision transformers, by the names in `excluded`.

    Defaults are the authors' for ResNet-50, with two differences. After a restart the mean e starts
    anew; theirs is put back, so that it restarts again and again. The prediction is that after the
    step; `predict="before"` is the authors' choice.

    Cost: 3 forward passes and 2 backward passes per batch. State: φ, momentum, e.

    Args:
        model: The source model; see `Adapter`.
        lr: The learning rate of SGD.
        statistics: Where mean and variance come from; see `Adapter`.
        rho: The ascent radius ρ.
        entropy_threshold: E₀, in nats.
        reset_threshold: Below which mean loss to restart; 0 for never.
        excluded: Names of modules whose scales and shifts are not trained.
        probabilities: The meaning of the logits; see `TENT`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, or if nothing is left to train.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.SAR(model, entropy_threshold=0.6)
        >>> logits = adapter(torch.rand(1, 3, 8, 8))
        >>> sorted(adapter.facts)
        ['kept', 'mean_loss', 'restarted']
    """
    objective = ReliableEntropy(entropy_threshold, probabilities)
    if isinstance(reset_threshold, str):
        if reset_threshold != "scaled":
            raise ValueError(
                f'reset_threshold is {reset_threshold!r}; pass a number of nats or "scaled"'
            )
        restore = RestartBelow(IMAGENET_RATIO, relative=True)
    else:
        restore = RestartBelow(reset_threshold)
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": objective},
        transforms=(SAM(rho=rho),),
        **{
            "optimizer": functools.partial(torch.optim.SGD, lr=lr, momentum=0.9),
            "parameters": functools.partial(_affine_outside, excluded=tuple(excluded)),
            "restore": restore,
            "on_empty": "skip",
            **options,
        },
    )


def _affine_outside(model: nn.Module, excluded: Sequence[str]) -> Iterable[nn.Parameter]:
    """Scales and shifts of normalisation layers, without those in the excluded modules."""
    return [
        parameter
        for name, parameter in norm_affine_parameters(model).items()
        if not any(f".{each}." in f".{name}." for each in excluded)
    ]
