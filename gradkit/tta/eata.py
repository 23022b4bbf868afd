"""Entropy minimisation on reliable, non-redundant predictions, without forgetting."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import entropies, log_distributions, threshold_of
from gradkit.tta.objectives import Image, Model, Probabilities, check_probabilities, logits_of
from gradkit.tta.statistics import Statistics


class ActiveEntropy:
    """The weighted entropy of predictions that are certain, and unlike those before; see `EATA`.

    If no prediction is kept, the objective abstains. State: the running mean of predictions.

    Args:
        threshold: E₀, in nats; by default 0.4·ln K.
        similarity: d, below which a cosine with the running mean counts as new.
        probabilities: The meaning of the logits; see `TENT`.
        source_images: Batches of the source's images, for the Fisher penalty.
        penalty: Its factor.

    Attributes:
        facts: The share of predictions that the last evaluation has kept, "kept".

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value.

    Examples:
        >>> objective = ActiveEntropy()
        >>> unsure = lambda images: torch.zeros(2, 3)
        >>> objective(unsure, torch.rand(2, 3, 8, 8)) is None
        True
    """

    def __init__(
        self,
        threshold: int | float | None = None,
        similarity: int | float = 0.05,
        probabilities: Probabilities = "auto",
        source_images: Iterable[Tensor] | None = None,
        penalty: int | float = 2000,
    ) -> None:
        if threshold is not None:
            check_number("entropy_threshold", threshold, above=0, finite=False)
        check_number("similarity", similarity, above=0)
        check_number("penalty", penalty, least=0)
        check_probabilities(probabilities)
        self.threshold, self.similarity, self.probabilities = threshold, similarity, probabilities
        self.source_images = None if source_images is None else list(source_images)
        self.penalty = penalty
        self.mean: Float[Tensor, "units outcomes"] | None = None
        self.facts: dict[str, Tensor] = {}
        self._before: Tensor | None = None
        # Of each trained parameter: the parameter, its source value and its Fisher information.
        self._anchors: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def attach(self, adapter: Adapter) -> None:
        """Measure the Fisher information of the trained parameters on the source's images."""
        if not self.source_images:
            return
        trained = list(adapter.trained().values())
        fisher = [torch.zeros_like(parameter) for parameter in trained]
        for images in self.source_images:
            with torch.enable_grad():
                logits = logits_of(adapter.model, images)
                log_p = log_distributions(logits, self.probabilities)
                loss = -log_p.max(dim=2).values.mean()
                rows = torch.autograd.grad(loss, trained, allow_unused=True)
            for total, row in zip(fisher, rows, strict=True):
                if row is not None:
                    total += row.square() / len(self.source_images)
        self._anchors = [
            (parameter, parameter.detach().clone(), information)
            for parameter, information in zip(trained, fisher, strict=True)
        ]
        self.source_images = None  # they are not needed any more

    def begin_step(self, images: Tensor) -> None:
        """Start from what earlier steps have seen."""
        self._before = self.mean

    def __call__(self, model: Model, image: Image) -> Tensor | None:
        """The loss, or None if nothing is kept."""
        log_p = log_distributions(logits_of(model, image), self.probabilities)
        h = entropies(log_p)
        threshold = threshold_of(log_p) if self.threshold is None else self.threshold
        p = log_p.detach().exp()
        kept = h.detach() < threshold
        if self._before is not None:
            known = self._before.reshape(1, *self._before.shape, *[1] * (p.dim() - 3))
            kept &= F.cosine_similarity(known, p, dim=2).abs() < self.similarity
        self.facts = {"kept": kept.float().mean()}
        if not kept.any():
            return None
        self.mean = _moved(self._before, p, kept)
        weights = torch.exp(threshold - h.detach())
        loss = (weights * h)[kept].mean()
        for parameter, source, fisher in self._anchors:
            loss = loss + self.penalty * (fisher * (parameter - source).square()).sum()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The running mean of predictions; None before the first."""
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.mean = state_dict["mean"]


def _moved(mean: Tensor | None, p: Tensor, kept: Tensor) -> Tensor:
    """0.9·mean + 0.1·mean of the kept predictions, for each unit that has any."""
    shape = (len(p), *p.shape[1:3], -1)
    chosen = kept.unsqueeze(2).to(p.dtype)
    counts = chosen.reshape(len(p), p.shape[1], 1, -1).sum(dim=(0, 3))
    now = torch.where(chosen > 0, p, 0).reshape(shape).sum(dim=(0, 3)) / counts.clamp_min(1)
    if mean is None:
        # A unit without a kept prediction stays at 0, whose cosines are 0: all of it is new.
        return now
    empty, unknown = counts == 0, mean.sum(dim=1, keepdim=True) == 0
    return torch.where(empty, mean, torch.where(unknown, now, 0.9 * mean + 0.1 * now))


def EATA(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 2.5e-4,
    statistics: str | Statistics = "test",
    entropy_threshold: int | float | None = None,
    similarity: int | float = 0.05,
    source_images: Iterable[Tensor] | None = None,
    penalty: int | float = 2000,
    probabilities: Probabilities = "auto",
    **options: Any,
) -> Adapter:
    """Efficient anti-forgetting test-time adaptation (EATA, ICML 2022).

    [Efficient Test-Time Model Adaptation without Forgetting](https://arxiv.org/abs/2204.02610),
    with φ the scales and shifts of normalisation layers and E₀ = 0.4·ln K for K outcomes:

        kept: predictions p with H(p) < E₀ and |cos(p, p̄)| < 0.05
        p̄ ← 0.9·p̄ + 0.1·mean of the kept p                       the first time, their mean
        φ ← φ − SGD(∇[mean of e^(E₀ − H)·H over the kept + 2000·Σ_i F_i·(φ_i − φ_source,i)²])
        predict by the output before the step

    e^(E₀ − H) is a constant. F is the Fisher information on images of the source: the mean over
    batches of the squared gradient of the cross-entropy with the model's own labels. Without
    `source_images` there is no penalty (the authors call it ETA). If nothing is kept, no step is
    taken (`last_step.applied` is False).

    For sigmoids each pixel of each class is a prediction with two outcomes (E₀ = 0.277), and there
    is one p̄ for each class. The cosine of two such predictions is below 0.05 only if they are
    opposite, so that 0.05, meant for 1000 classes (0.4 for 10), keeps little; raise it for few
    classes.

    Cost: 2 forward passes and 1 backward pass per batch. State: φ, momentum, p̄.

    Args:
        model: The source model; see `Adapter`.
        lr: The learning rate of SGD, with a momentum of 0.9; the authors' for ResNet-50.
        statistics: Where mean and variance come from; see `Adapter`.
        entropy_threshold: E₀, in nats.
        similarity: The bound on the cosine.
        source_images: Batches of the source's images, for F; the authors take 2000 images.
        penalty: The factor of the penalty.
        probabilities: The meaning of the logits; see `TENT`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If a number is none.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.EATA(model, entropy_threshold=0.6, similarity=1.1)
        >>> logits = adapter(torch.rand(1, 3, 8, 8))
        >>> adapter.last_step.applied, adapter.facts["kept"] > 0.1
        (True, tensor(True))
    """
    objective = ActiveEntropy(entropy_threshold, similarity, probabilities, source_images, penalty)
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": objective},
        **{
            "optimizer": functools.partial(torch.optim.SGD, lr=lr, momentum=0.9),
            "predict": "before",
            "on_empty": "skip",
            **options,
        },
    )
