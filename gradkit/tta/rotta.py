"""Adaptation by a balanced memory and a teacher with statistics of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.core.arguments import check_count, own_generator
from gradkit.teachers import EMA
from gradkit.tta.adapter import Adapter
from gradkit.tta.augment import StrongAugmentation
from gradkit.tta.balanced_memory import BalancedMemory
from gradkit.tta.distributions import (
    Distributions,
    cross_entropies,
    entropies,
    log_distributions,
)
from gradkit.tta.objectives import (
    Augmentation,
    Image,
    Logits,
    Probabilities,
    Scalar,
    check_probabilities,
    logits_of,
)
from gradkit.tta.parts import KeptLogits
from gradkit.tta.running import RunningStatistics, learning
from gradkit.tta.statistics import Statistics


class MemoryConsistency:
    """Consistency of the student with its teacher on remembered images; see `RoTTA`.

    Between updates the objective abstains. The adapter needs a transform with a teacher, such as
    `gk.EMA`. State: the memory, and the augmentation's generator.

    Args:
        memory: The number of images that are remembered, N.
        every: After how many images there is an update.
        augmentation: `(images, generator) -> images` of the same shape, for the student.
        probabilities: The meaning of the logits; see `TENT`.
        generator: The augmentation's generator, on the CPU; by default a new one with seed 0.

    Attributes:
        prediction: The teacher's logits for the last batch, before the update.
        facts: How many images are "remembered", whether the batch "updated" the weights, and the
            mean "uncertainty" of the batch.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value; or, when the adapter is made, if it has no
            teacher; or, in a call, if a batch has more than `every` images, or images of another
            shape than those before.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Adapter(
        ...     model,
        ...     objectives={"loss": MemoryConsistency(memory=4, every=2)},
        ...     transforms=lambda student: (gk.EMA(student, decay=0.999, buffers="skip"),),
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ...     on_empty="skip",
        ... )
        >>> for _ in range(2):
        ...     _ = adapter(torch.rand(1, 3, 8, 8))
        ...     print(adapter.facts["remembered"], adapter.facts["updated"])
        1 False
        2 True
    """

    def __init__(
        self,
        memory: int = 64,
        every: int = 64,
        augmentation: Augmentation | None = None,
        probabilities: Probabilities = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("memory", memory)
        check_count("every", every)
        check_probabilities(probabilities)
        self.size, self.every, self.probabilities = memory, every, probabilities
        self.augmentation = augmentation or StrongAugmentation()
        self.generator = own_generator(generator)
        self.memory: BalancedMemory | None = None
        self.teacher: nn.Module | None = None
        self.prediction: Logits | None = None
        self.facts: dict[str, Any] = {}
        # Of an update: the images, their weights, the student's view of them, the teacher's answer.
        self._due: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None
        self._target: Distributions | None = None

    def attach(self, adapter: Adapter) -> None:
        """Take the adapter's teacher.

        Raises:
            ValueError: If there is none.
        """
        if adapter.teacher is None:
            raise ValueError(
                "there is no teacher to learn from; pass transforms=lambda student: "
                '(gk.EMA(student, decay=0.999, buffers="skip"),)'
            )
        self.teacher = adapter.teacher

    def check_images(self, images: Tensor) -> None:
        """Check that the images can be remembered.

        Raises:
            ValueError: If they cannot.
        """
        check = getattr(self.augmentation, "check_images", None)
        if check is not None:
            check(images)
        if len(images) > self.every:
            raise ValueError(
                f"a batch has {len(images)} images, but there is an update after every "
                f"{self.every}: pass at most {self.every} at once, or a larger every="
            )
        known = None if self.memory is None else self.memory.shape
        if known is not None and known != images.shape[1:]:
            raise ValueError(
                f"the memory holds images of shape {list(known)}, but these have shape "
                f"{list(images.shape[1:])}: images of a stream must be of one size; call reset() "
                "before those of another"
            )

    def begin_batch(self, images: Tensor) -> None:
        """Let the teacher predict, and remember the images."""
        assert self.teacher is not None
        self.prediction = logits_of(self.teacher, images)
        log_p = log_distributions(self.prediction, self.probabilities)
        outcomes = log_p.shape[2]
        uncertainties = (entropies(log_p) / math.log(outcomes)).flatten(1).mean(dim=1)
        # One prediction for each image, which has a class.
        single = math.prod(log_p.shape[1:]) == outcomes
        labels = log_p.flatten(1).argmax(dim=1).tolist() if single else [0] * len(images)
        if self.memory is None:
            self.memory = BalancedMemory(self.size, outcomes if single else 1)
        self._due = self._view = self._target = None
        for image, label, uncertainty in zip(images, labels, uncertainties.tolist(), strict=True):
            if not math.isfinite(uncertainty):
                continue
            self.memory.offer(image.detach().clone(), label, uncertainty)
            if self.memory.offered % self.every == 0:
                ages = torch.exp(-self.memory.ages())
                self._due = self.memory.images(), ages / (1 + ages)
        self.facts = {
            "remembered": len(self.memory),
            "updated": self._due is not None,
            "uncertainty": uncertainties.mean(),
        }

    def begin_step(self, images: Tensor) -> None:
        """Let the teacher answer for the memory, and augment that for the student."""
        if self._due is None:
            return
        assert self.teacher is not None
        remembered, _ = self._due
        with torch.no_grad():
            with learning(self.teacher):
                answer = logits_of(self.teacher, remembered)
            self._target = log_distributions(answer, self.probabilities).exp()
            self._view = self.augmentation(remembered, self.generator)

    def __call__(self, model: nn.Module, image: Image) -> Scalar | None:
        """The loss, or None if there is no update."""
        if self._due is None:
            return None
        assert self._view is not None
        assert self._target is not None
        with learning(model):
            log_p = log_distributions(logits_of(model, self._view), self.probabilities)
        losses = cross_entropies(self._target, log_p).flatten(1).mean(dim=1)
        return (losses * self._due[1].to(losses)).mean()

    def state_dict(self) -> dict[str, Any]:
        """The memory, None before the first batch, and the generator's state."""
        return {
            "memory": None if self.memory is None else self.memory.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        memory = state_dict["memory"]
        self.memory = None
        if memory is not None:
            self.memory = BalancedMemory(self.size, len(memory["entries"]))
            self.memory.load_state_dict(memory)
        self.generator.set_state(state_dict["generator"].cpu())


def RoTTA(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-3,
    statistics: str | Statistics | None = None,
    momentum: int | float = 0.05,
    decay: float = 0.999,
    memory: int = 64,
    every: int = 64,
    augmentation: Augmentation | None = None,
    probabilities: Probabilities = "auto",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Adapter:
    """Robust test-time adaptation (RoTTA, CVPR 2023).

    [Robust Test-Time Adaptation in Dynamic Scenarios](https://arxiv.org/abs/2303.13899), with φ the
    scales and shifts of normalisation layers, φ' the teacher's, and for each of both models its own
    running statistics μ, v. Each image is predicted by the teacher, as it is, and offered to a
    memory of N = 64 (`gradkit.tta.balanced_memory`). After every 64 images:

        μ, v ← 0.95·(μ, v) + 0.05·(of the memory)        teacher, used and stored
        q    = p(memory; φ')
        μ, v ← 0.95·(μ, v) + 0.05·(of strong(memory))    student, used and stored, with gradients
        φ    ← φ − Adam(∇ mean over the memory of w(age)·CE(p(strong(memory); φ), q))
        φ'   ← 0.999·φ' + 0.001·φ
        w(a) = e^(−a)/(1 + e^(−a)),  a = age/N

    A classifier's memory is balanced over its predicted classes. Dense predictions, and those of
    several labels, have no class: there the memory is one of recent and certain images, with the
    mean entropy over pixels, and CE is the mean over pixels. This port is not the authors'. Images
    whose prediction is not finite are not remembered. A stream of fewer than 64 images is predicted
    as by the source model: for small ones choose smaller `memory` and `every`.

    Defaults are the authors' for CIFAR, except for the augmentation: theirs also moves, rotates and
    mirrors, which a segmentation would have to undo. Here it is `StrongAugmentation`, which changes
    intensities of images in [0, 1]. Pass `augmentation` for another; with the same one, a
    classifier's logits were those of the authors' code.

    Cost: 1 forward pass per image; every 64 images 1 forward pass of the teacher, 1 forward and 1
    backward pass of the student, of 64 images each. State: φ, φ', both models' statistics, Adam's
    moments, 64 images, the generator. The state is copied for each batch, to be restored if one
    fails.

    Args:
        model: The source model; see `Adapter`. All images must be of one size.
        lr: Adam's learning rate.
        statistics: Where mean and variance come from; by default as above. A model without
            BatchNorm takes "source".
        momentum: The memory's share in the statistics.
        decay: The teacher's decay.
        memory: N, the number of images that are remembered.
        every: After how many images there is an update; a batch must not have more.
        augmentation: `(images, generator) -> images`, of the same shape.
        probabilities: The meaning of the logits; see `TENT`.
        generator: The augmentation's generator, on the CPU; by default a new one with seed 0.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, or if the model has no BatchNorm with running
            statistics; in a call, if there are more than `every` images, if their size has changed,
            or if the augmentation cannot work with them.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.RoTTA(model, memory=4, every=4)
        >>> for _ in range(4):
        ...     logits = adapter(torch.rand(1, 3, 8, 8))
        >>> adapter.last_step.applied, adapter.facts["updated"]
        (True, True)
    """
    running = RunningStatistics(momentum, uses_moved=True)
    return Adapter(
        model,
        statistics=running if statistics is None else statistics,
        objectives={
            "loss": MemoryConsistency(memory, every, augmentation, probabilities, generator)
        },
        transforms=lambda student: (EMA(student, decay=decay, buffers="skip"),),
        **{
            "optimizer": functools.partial(torch.optim.Adam, lr=lr),
            "predict": KeptLogits("prediction"),
            "on_empty": "skip",
            **options,
        },
    )
