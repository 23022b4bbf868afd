"""Entropy minimisation on predictions that depend on shape."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradkit.core.arguments import check_count, check_number, own_generator
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import entropies, log_distributions, threshold_of
from gradkit.tta.objectives import Image, Model, Probabilities, check_probabilities, logits_of
from gradkit.tta.statistics import Statistics


def shuffle_patches(image: Image, patches: int, generator: torch.Generator) -> Image:
    """Each image cut into patches × patches parts, which are put back in a random order.

    The order is drawn for each image. If a side is no multiple of `patches`, the rest at its end
    stays where it is.

    Examples:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> shuffle_patches(image, 2, torch.Generator().manual_seed(0))[0, 0]
        tensor([[ 8.,  9., 10., 11.],
                [12., 13., 14., 15.],
                [ 0.,  1.,  2.,  3.],
                [ 4.,  5.,  6.,  7.]])
    """
    height, width = (side // patches for side in image.shape[-2:])
    covered = image[..., : patches * height, : patches * width]
    leading = image.shape[:-2]
    parts = covered.reshape(*leading, patches, height, patches, width).transpose(-3, -2)
    parts = parts.reshape(len(image), -1, patches * patches, height, width)
    drawn = torch.rand(len(image), patches * patches, generator=generator).argsort(dim=1)
    order = drawn.to(image.device)[:, None, :, None, None].expand_as(parts)
    moved = parts.gather(2, order).reshape(*leading, patches, patches, height, width)
    result = image.clone()
    result[..., : patches * height, : patches * width] = moved.transpose(-3, -2).reshape(
        covered.shape
    )
    return result


class ShapeEntropy:
    """The weighted entropy of predictions that are certain and fall when shapes go; see `DeYO`.

    If none is kept, the objective abstains. The patches' order is drawn once per step. State: the
    generator.

    Args:
        entropy_share: τ: entropies below entropy_share·ln K are kept.
        margin_share: E₀ = margin_share·ln K, of the weights.
        difference: Below which fall of probability a prediction is left out.
        patches: The number of patches along a side.
        probabilities: The meaning of the logits; see `TENT`.
        generator: The generator of the orders, on the CPU; by default a new one with seed 0.

    Attributes:
        facts: The share of predictions that the last evaluation has kept, "kept".

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value.

    Examples:
        >>> objective = ShapeEntropy()
        >>> blind = lambda images: torch.tensor([[9.0, 0.0]])  # shapes do not matter to it
        >>> objective(blind, torch.rand(1, 3, 8, 8)) is None
        True
    """

    def __init__(
        self,
        entropy_share: int | float = 0.5,
        margin_share: int | float = 0.4,
        difference: int | float = 0.2,
        patches: int = 4,
        probabilities: Probabilities = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        check_number("entropy_share", entropy_share, above=0)
        check_number("margin_share", margin_share)
        check_number("difference", difference, least=-1, most=1)
        check_count("patches", patches)
        check_probabilities(probabilities)
        self.entropy_share, self.margin_share = entropy_share, margin_share
        self.difference, self.patches, self.probabilities = difference, patches, probabilities
        self.generator = own_generator(generator)
        self.facts: dict[str, Tensor] = {}
        self._shuffled: Tensor | None = None

    def check_images(self, images: Tensor) -> None:
        """Check that the images can be cut into patches.

        Raises:
            ValueError: If they cannot.
        """
        if images.dim() < 4 or min(images.shape[-2:]) < self.patches:
            raise ValueError(
                f"images of shape {list(images.shape)} cannot be cut into {self.patches} by "
                f"{self.patches} patches: pass larger images [N, channels, H, W], or fewer patches="
            )

    def begin_step(self, images: Tensor) -> None:
        """Draw the patches' order."""
        self._shuffled = None

    def __call__(self, model: Model, image: Image) -> Tensor | None:
        """The loss, or None if nothing is kept."""
        if self._shuffled is None:
            self._shuffled = shuffle_patches(image, self.patches, self.generator)
        log_p = log_distributions(logits_of(model, image), self.probabilities)
        h = entropies(log_p)
        with torch.no_grad():
            log_q = log_distributions(logits_of(model, self._shuffled), self.probabilities)
            label = log_p.argmax(dim=2, keepdim=True)
            fall = (log_p.exp().gather(2, label) - log_q.exp().gather(2, label)).squeeze(2)
            kept = (h < threshold_of(log_p, self.entropy_share)) & (fall > self.difference)
            margin = threshold_of(log_p, self.margin_share)
            weights = torch.exp(margin - h) + torch.exp(fall)
        self.facts = {"kept": kept.float().mean()}
        return (weights * h)[kept].mean() if kept.any() else None

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.generator.set_state(state_dict["generator"].cpu())


def DeYO(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 2.5e-4,
    statistics: str | Statistics = "test",
    entropy_share: int | float = 0.5,
    margin_share: int | float = 0.4,
    difference: int | float = 0.2,
    patches: int = 4,
    probabilities: Probabilities = "auto",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Adapter:
    """Destroy your object (DeYO, ICLR 2024).

    [Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled
    Factors](https://arxiv.org/abs/2403.07366), with φ the scales and shifts of normalisation
    layers, x' the image with its 4 × 4 patches shuffled, and ŷ the predicted outcome of K:

        PLPD = p_ŷ(x) − p_ŷ(x')
        kept: predictions with H < 0.5·ln K and PLPD > 0.2
        φ ← φ − SGD(∇ mean over the kept of [e^(0.4·ln K − H) + e^PLPD]·H)

    The factor in brackets is a constant. If nothing is kept, no step is taken
    (`last_step.applied` is False). The method is for classifiers. For dense logits each pixel (of
    each class, for sigmoids) is a prediction here, compared with the same place of the shuffled
    image; this port is not the authors'. The prediction is that after the step; `predict="before"`
    is the authors' choice.

    Cost: 3 forward passes and 1 backward pass per batch. State: φ, momentum, the generator.

    Args:
        model: The source model; see `Adapter`.
        lr: The learning rate of SGD, with a momentum of 0.9; the authors' for ResNet-50.
        statistics: Where mean and variance come from; see `Adapter`.
        entropy_share: The bound on the entropy, in units of ln K.
        margin_share: The margin of the weights, in units of ln K.
        difference: The bound on PLPD.
        patches: The number of patches along a side.
        probabilities: The meaning of the logits; see `TENT`.
        generator: The generator of the patches' orders, on the CPU; by default a new one with
            seed 0.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value; in a call, if images are smaller than the
            number of patches.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.DeYO(model, entropy_share=1.0, difference=0.0)
        >>> logits = adapter(torch.rand(1, 3, 8, 8))
        >>> adapter.last_step.applied
        True
    """
    objective = ShapeEntropy(
        entropy_share, margin_share, difference, patches, probabilities, generator
    )
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": objective},
        **{
            "optimizer": functools.partial(torch.optim.SGD, lr=lr, momentum=0.9),
            "on_empty": "skip",
            **options,
        },
    )
