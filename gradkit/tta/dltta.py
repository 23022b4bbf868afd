"""A learning rate that follows the distance to similar images seen before."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform
from gradkit.tta.adapter import Adapter, OptimizerFactory
from gradkit.tta.distributions import Distributions, log_distributions
from gradkit.tta.features import captured_inputs, classifier_of
from gradkit.tta.objectives import (
    Image,
    Logits,
    Model,
    Probabilities,
    Scalar,
    check_probabilities,
    logits_of,
    prediction_entropy,
)
from gradkit.tta.statistics import Statistics

Keys = Float[Tensor, "batch length"]


@dataclass(frozen=True)
class DLTTAPreset:
    """The settings of one of the authors' programs; see `DLTTA`.

    Attributes:
        size: The number of images that the memory keeps.
        neighbours: How many of them are compared with an image.
        cosine: Whether similarity is softmax(cosine / 0.2); otherwise the inner product, with equal
            weights.
        temperature: What logits are divided by before they are compared.
        halved: Whether the distance is half the sum of both divergences.
        exponential: Whether the factor of the learning rate is e^D; otherwise it is D.
        counts: Whether the factor is the number of entries until the memory is full; otherwise it
            is 1 until there are enough neighbours.
        lr: The learning rate.
    """

    size: int
    neighbours: int
    cosine: bool
    temperature: float
    halved: bool
    exponential: bool
    counts: bool
    lr: float


PRESETS = {
    "oct": DLTTAPreset(20, 8, True, 4.0, False, True, True, 1e-3),
    "classification": DLTTAPreset(800, 4, False, 2.0, True, False, False, 1e-4),
}
"""The authors' settings for the segmentation of OCT images, and for classification."""


def retrieved(
    key: Float[Tensor, " length"],
    keys: Float[Tensor, "entries length"],
    values: Float[Tensor, "entries ..."],
    neighbours: int,
    cosine: bool,
) -> Float[Tensor, "*value"]:
    """The mean of the values whose keys are most similar.

    Examples:
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> values = torch.tensor([[1.0], [2.0], [3.0]])
        >>> retrieved(torch.tensor([2.0, 1.0]), keys, values, neighbours=2, cosine=False)
        tensor([1.5000])
    """
    if not cosine:
        nearest = (keys @ key).topk(neighbours).indices
        return values[nearest].mean(dim=0)
    similar, nearest = torch.cosine_similarity(keys, key.unsqueeze(0)).topk(neighbours)
    weights = (similar / 0.2).softmax(dim=0)
    mean: Tensor = torch.tensordot(weights.to(values.dtype), values[nearest], dims=1)
    return mean


def symmetric_divergence(log_p: Distributions, log_q: Distributions) -> Scalar:
    """KL(p‖q) + KL(q‖p), summed over units, averaged over images and positions.

    Examples:
        >>> p, q = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
        >>> symmetric_divergence(p.reshape(1, 1, 2), q.reshape(1, 1, 2))  # ¼·log 3
        tensor(0.2747)
    """
    low = torch.finfo(log_p.dtype).min
    log_p, log_q = log_p.clamp_min(low), log_q.clamp_min(low)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=(1, 2)).mean()


class MemoryPredictor:
    """Predicts as usual, and remembers features and logits of the latest images; see `DLTTA`.

    State: the memory.

    Args:
        size: The number of images that are kept.
        features: The name of the module whose output is the key; by default the input of the last
            linear or convolutional layer, averaged over positions.

    Raises:
        ValueError: When the adapter is made, if there is no such module.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
        >>> adapter = gk.tta.PTBN(model, predict=MemoryPredictor(size=20))
        >>> logits = adapter(torch.rand(3, 3, 8, 8))
        >>> adapter.predict.keys.shape, adapter.predict.values.shape
        (torch.Size([3, 2]), torch.Size([3, 2, 8, 8]))
    """

    def __init__(self, size: int, features: str | None = None) -> None:
        self.size, self.features = size, features
        self.keys: Float[Tensor, "entries length"] | None = None
        self.values: Float[Tensor, "entries classes *positions"] | None = None

    def attach(self, adapter: Adapter) -> None:
        """Check that the module is there.

        Raises:
            ValueError: If it is not.
        """
        classifier_of(adapter.model, self.features)

    def __len__(self) -> int:
        return 0 if self.keys is None else len(self.keys)

    def look(self, model: Any, images: Tensor) -> tuple[Keys, Logits]:
        """Keys and logits of images, in one forward pass."""
        module = classifier_of(model, self.features)
        if self.features is None:
            with captured_inputs(module) as seen:
                logits = logits_of(model, images)
            positions = list(range(2, seen[-1].dim()))
            return (seen[-1].mean(dim=positions) if positions else seen[-1]).detach(), logits
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            logits = logits_of(model, images)
        finally:
            handle.remove()
        return outputs[-1].detach().flatten(1), logits

    def __call__(self, model: nn.Module, images: Tensor) -> Logits:
        """The logits; the oldest images make place for these, as far as they are finite."""
        keys, logits = self.look(model, images)
        predicted = logits
        finite = keys.isfinite().all(dim=1) & logits.flatten(1).isfinite().all(dim=1)
        keys, logits = keys[finite], logits[finite]
        if not len(keys):
            return predicted
        if self.keys is not None and self.values is not None:
            if self.values.shape[1:] != logits.shape[1:] or self.keys.shape[1:] != keys.shape[1:]:
                raise ValueError(
                    f"the memory holds logits of shape {list(self.values.shape[1:])}, but those of "
                    f"these images have shape {list(logits.shape[1:])}: images of a stream must be "
                    "of one size; call reset() before those of another"
                )
            self.keys = torch.cat([self.keys, keys])[-self.size :].clone()
            self.values = torch.cat([self.values, logits])[-self.size :].clone()
        else:
            self.keys, self.values = keys[-self.size :].clone(), logits[-self.size :].clone()
        return predicted

    def state_dict(self) -> dict[str, Any]:
        """Keys and values, the oldest first; None before the first batch."""
        return {"keys": self.keys, "values": self.values}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.keys, self.values = state_dict["keys"], state_dict["values"]


class MeasuredEntropy:
    """An entropy that also measures the distance to what the memory holds; see `DLTTA`.

    The adapter's `predict` must be a `MemoryPredictor`.

    Args:
        preset: The settings.
        probabilities: The meaning of the logits; see `TENT`.

    Attributes:
        factor: The factor of the learning rate in this step.
        facts: The "distance" D, None before there are enough images, and the factor "lr_scale".

    Raises:
        ValueError: If `probabilities` has no valid value; or, when the adapter is made, if it has
            no memory.
    """

    def __init__(
        self,
        preset: DLTTAPreset,
        probabilities: Probabilities = "auto",
    ) -> None:
        check_probabilities(probabilities)
        self.preset, self.probabilities = preset, probabilities
        self.memory: MemoryPredictor | None = None
        self.factor: Tensor | None = None
        self.facts: dict[str, Tensor | None] = {}

    def attach(self, adapter: Adapter) -> None:
        """Take the adapter's memory.

        Raises:
            ValueError: If it has none.
        """
        if not isinstance(adapter.predict, MemoryPredictor):
            raise ValueError(
                "the learning rate depends on a memory of earlier images, which predict= replaces; "
                "leave predict out"
            )
        self.memory = adapter.predict

    def begin_step(self, images: Tensor) -> None:
        """The first evaluation in a step sets the factor."""
        self.factor = None

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss."""
        assert self.memory is not None
        keys, logits = self.memory.look(model, image)
        if self.factor is None:
            with torch.no_grad():
                self._measure(keys, logits.detach())
        return prediction_entropy(lambda _: logits, image, self.probabilities)

    def _measure(self, keys: Keys, logits: Logits) -> None:
        preset, memory = self.preset, self.memory
        assert memory is not None
        count = len(memory)
        distance: Tensor | None = None
        if count < (preset.size if preset.counts else preset.neighbours):
            factor = torch.tensor(float(count) if preset.counts else 1.0, dtype=logits.dtype)
        else:
            assert memory.keys is not None
            assert memory.values is not None
            similar = torch.stack(
                [
                    retrieved(key, memory.keys, memory.values, preset.neighbours, preset.cosine)
                    for key in keys
                ]
            )
            log_p, log_q = (
                log_distributions(z / preset.temperature, self.probabilities)
                for z in (logits, similar)
            )
            distance = symmetric_divergence(log_p, log_q) * (0.5 if preset.halved else 1.0)
            factor = torch.exp(distance) if preset.exponential else distance
        self.factor = factor.to(logits.device)
        self.facts = {"distance": distance, "lr_scale": self.factor}


class _MeasuredLR(Transform):
    """Scales the learning rate by the factor that the objective has measured."""

    needs_rows = False

    def attach(self, adapter: Adapter) -> None:
        self.objective: Any = adapter.objectives["loss"]

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            gradients = inner(at, only)
            return gradients.with_lr_scale(self.objective.factor)

        return oracle

    def __repr__(self) -> str:
        return "MeasuredLR()"


def DLTTA(  # noqa: N802 # the method's name
    model: nn.Module,
    preset: str | DLTTAPreset = "oct",
    lr: float | None = None,
    statistics: str | Statistics = "test",
    features: str | None = None,
    probabilities: Probabilities = "auto",
    optimizer: OptimizerFactory | None = None,
    **options: Any,
) -> Adapter:
    """Dynamic learning rate for test-time adaptation (DLTTA, IEEE TMI 2022).

    [DLTTA: Dynamic Learning Rate for Test-Time Adaptation on Cross-Domain Medical
    Images](https://arxiv.org/abs/2205.13723): TENT, whose learning rate depends on the distance of
    a prediction z to z̄, the mean of those of the k most similar images in a memory of the last n:

        D = KL(p‖p̄) + KL(p̄‖p)         p, p̄ from z/T, z̄/T; the sum over classes, the mean of pixels
        φ ← Adam step on the entropy with learning rate lr·f(D)
        predict x with φ; remember features and logits of x

    | preset | n | k | similarity | T | D | f(D) | until the memory is full |
    |---|---|---|---|---|---|---|---|
    | "oct" | 20 | 8 | softmax(cosine/0.2) | 4 | the sum | e^D | f = the number of entries |
    | "classification" | 800 | 4 | inner product | 2 | half the sum | D | f = 1 until there are k |

    Both are the authors' programs, but for the features. Theirs are the flattened bottleneck of a
    U-Net, and what a classifier reads; here by default it is what the last layer reads, averaged
    over positions. Pass `features="res.layer4"`, say, for a bottleneck. Their learning rate for
    classification is not known; 1e-4 is GraTa's for TENT.

    Cost: 2 forward passes and 1 backward pass per batch. State: φ, Adam's moments, the memory with
    the logits of n images.

    Args:
        model: The source model; see `Adapter`. All images must be of one size.
        preset: "oct", "classification", or settings of one's own.
        lr: Adam's learning rate before scaling; by default the preset's.
        statistics: Where mean and variance come from; see `Adapter`.
        features: The name of the module whose output is compared.
        probabilities: The meaning of the logits; see `TENT`.
        optimizer: Makes a base optimizer other than Adam with `lr`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        ValueError: If an argument has no valid value; in a call, if the images' size has changed.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.DLTTA(model, preset="classification")
        >>> for _ in range(5):
        ...     logits = adapter(torch.rand(1, 3, 8, 8))
        >>> adapter.facts["distance"] == adapter.last_step.lr_scale
        tensor(True)
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; choose one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    rate = preset.lr if lr is None else lr
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = optimizer or (
        lambda parameters: torch.optim.Adam(parameters, lr=rate)
    )
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": MeasuredEntropy(preset, probabilities)},
        transforms=(_MeasuredLR(),),
        optimizer=make,
        **{"predict": MemoryPredictor(preset.size, features), **options},
    )
