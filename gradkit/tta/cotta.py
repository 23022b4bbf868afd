"""Continual adaptation by a teacher that averages weights and views."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.teachers import EMA
from gradkit.teachers.copying import copied
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import cross_entropies, log_distributions
from gradkit.tta.objectives import (
    Image,
    Logits,
    Model,
    Probabilities,
    Scalar,
    check_probabilities,
    logits_of,
    logits_of_views,
)
from gradkit.tta.parts import KeptLogits
from gradkit.tta.restore import StochasticRestore
from gradkit.tta.statistics import Statistics
from gradkit.tta.views import WEAK_VIEWS, View, check_views


class TeacherTarget:
    """Cross-entropy with the teacher's output, averaged over views where it may be wrong.

    See `CoTTA`. The adapter needs a transform with a teacher, such as `gk.EMA`.

    Args:
        confidence: Below which mean confidence of the source model to average over views.
        views: The views of the images.
        probabilities: The meaning of the logits; see `TENT`.
        batched_views: Whether views take one forward pass together; see
            `gradkit.tta.objectives.logits_of_views`.

    Attributes:
        target: The teacher's logits for the last batch.
        facts: The source model's mean "confidence", and whether the target was "averaged".

    Raises:
        TypeError: If the confidence is no number.
        ValueError: If there is no view or an argument has no valid value; or, when the adapter is
            made, if it has no teacher.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Adapter(
        ...     model,
        ...     objectives={"loss": TeacherTarget()},
        ...     transforms=lambda student: (gk.EMA(student, decay=0.999),),
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ... )
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, sorted(adapter.facts)
        (torch.Size([1, 2, 8, 8]), ['averaged', 'confidence'])
    """

    def __init__(
        self,
        confidence: int | float = 0.92,
        views: Sequence[View] = WEAK_VIEWS,
        probabilities: Probabilities = "auto",
        batched_views: bool = False,
    ) -> None:
        check_number("confidence", confidence, least=0)
        if not views:
            raise ValueError("views is empty; pass one view at least, such as gk.tta.WEAK_VIEWS[0]")
        check_probabilities(probabilities)
        self.confidence, self.views, self.probabilities = confidence, tuple(views), probabilities
        self.batched_views = batched_views
        self.teacher: nn.Module | None = None
        self.source: nn.Module | None = None
        self.target: Logits | None = None
        self.facts: dict[str, Any] = {}

    def attach(self, adapter: Adapter) -> None:
        """Take the adapter's teacher, and a copy of its source model.

        Raises:
            ValueError: If there is no teacher.
        """
        if adapter.teacher is None:
            raise ValueError(
                "there is no teacher to learn from; pass transforms=lambda student: "
                "(gk.EMA(student, decay=0.999),)"
            )
        self.teacher, self.source = adapter.teacher, copied(adapter.model)

    def check_images(self, images: Tensor) -> None:
        """Check that the views can be applied to these images.

        Raises:
            ValueError: If they cannot.
        """
        check_views(self.views, images)

    def begin_step(self, images: Tensor) -> None:
        """Ask the teacher: its answer is the same at displaced weights."""
        assert self.teacher is not None
        assert self.source is not None
        with torch.no_grad():
            log_p = log_distributions(logits_of(self.source, images), self.probabilities)
            confidence = log_p.exp().amax(dim=2).mean()
            averaged = bool(confidence < self.confidence)
            self.target = self._mean(images) if averaged else logits_of(self.teacher, images)
        self.facts = {"confidence": confidence, "averaged": averaged}

    def _mean(self, images: Tensor) -> Tensor:
        """The teacher's mean logits over views, each mapped back."""
        assert self.teacher is not None
        outputs = logits_of_views(self.teacher, images, self.views, self.batched_views)
        return torch.stack(outputs).mean(dim=0)

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss."""
        assert self.target is not None
        log_p = log_distributions(logits_of(model, image), self.probabilities)
        target = log_distributions(self.target, self.probabilities).exp()
        return cross_entropies(target, log_p).mean()


def CoTTA(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-3,
    statistics: str | Statistics = "test",
    decay: float = 0.999,
    confidence: int | float = 0.92,
    restore_probability: int | float = 0.01,
    views: Sequence[View] = WEAK_VIEWS,
    probabilities: Probabilities = "auto",
    generator: torch.Generator | None = None,
    batched_views: bool = False,
    **options: Any,
) -> Adapter:
    """Continual test-time adaptation (CoTTA, CVPR 2022).

    [Continual Test-Time Domain Adaptation](https://arxiv.org/abs/2203.13591), with θ all weights,
    θ' the teacher's, z its logits:

        ẑ  = mean over views of view⁻¹(z(view(x); θ'))     if the source's mean confidence < 0.92
        ẑ  = z(x; θ')                                      otherwise
        θ  ← θ − Adam(∇CE(p(x; θ), p̂))                      p̂ the probabilities of ẑ
        θ' ← 0.999·θ' + 0.001·θ
        each single weight of θ back to the source's with probability 0.01
        predict by ẑ

    The confidence is the mean of the largest probability. Source and teacher take the same
    statistics as the student. The authors average over 32 augmentations of a classifier's images,
    and for segmentation over 6 scales and mirrorings. Here these are the six weak views, which fit
    networks of any stride; this port is not theirs.

    Cost: 1 forward pass of the source, 6 of the teacher (1 if the source is confident), 1 forward
    and 1 backward pass of the student. State: θ, θ', Adam's moments, the generator.

    Args:
        model: The source model; see `Adapter`.
        lr: Adam's learning rate; the authors' for CIFAR.
        statistics: Where mean and variance come from; see `Adapter`.
        decay: The teacher's decay.
        confidence: Below which confidence to average over views; the authors take 0.92 for CIFAR-10
            and 0.72 for CIFAR-100.
        restore_probability: The probability of restoring a weight.
        views: The views of the images. Pass others for a classifier, if flips or quarter turns may
            change the class: the prediction is the mean over views.
        probabilities: The meaning of the logits; see `TENT`.
        generator: The generator of the restored weights, on the CPU; by default a new one with
            seed 0.
        batched_views: Whether the teacher evaluates views together, with each one's own statistics.
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
        >>> adapter = gk.tta.CoTTA(model)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.facts["averaged"]
        (torch.Size([1, 2, 8, 8]), True)
    """
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": TeacherTarget(confidence, views, probabilities, batched_views)},
        transforms=lambda student: (EMA(student, decay=decay),),
        **{
            "optimizer": functools.partial(torch.optim.Adam, lr=lr),
            "parameters": nn.Module.parameters,
            "predict": KeptLogits("target"),
            "restore": StochasticRestore(restore_probability, generator),
            **options,
        },
    )
