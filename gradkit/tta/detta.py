"""Adaptation by a denoising head that was trained on the source; for other heads see `heads`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number, own_generator
from gradkit.tta.adapter import Adapter
from gradkit.tta.heads import Head, check_restorable, restoration_error
from gradkit.tta.objectives import Image, Scalar
from gradkit.tta.running import RunningStatistics, learning
from gradkit.tta.statistics import Statistics

Noise = Literal["blind_spots", "gaussian"]


def blind_spots(
    image: Float[Tensor, "batch channels height width"],
    share: int | float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch channels height width"], Bool[Tensor, "batch 1 height width"]]:
    """Images in which a share of the pixels is replaced by a neighbour, and which these are.

    The neighbour is drawn from the 24 others of the 5 × 5 pixels around; past an edge it is the
    pixel at the edge. All channels of a pixel are replaced alike.

    Examples:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> noisy, replaced = blind_spots(image, 0.5, torch.Generator().manual_seed(0))
        >>> torch.equal(noisy[~replaced], image[~replaced]), replaced.shape
        (True, torch.Size([1, 1, 4, 4]))
    """
    count, _, height, width = image.shape
    shape = (count, height, width)
    replaced = torch.rand(shape, generator=generator) < share
    drawn = torch.randint(24, shape, generator=generator)
    place = drawn + (drawn >= 12)  # 12 of 0 … 24 is the pixel itself
    rows = (torch.arange(height)[:, None] + place // 5 - 2).clamp(0, height - 1)
    columns = (torch.arange(width) + place % 5 - 2).clamp(0, width - 1)
    where = (rows * width + columns).flatten(1).to(image.device)
    neighbours = image.flatten(2).gather(2, where.unsqueeze(1).expand(-1, image.shape[1], -1))
    chosen = replaced.unsqueeze(1).to(image.device)
    return torch.where(chosen, neighbours.view_as(image), image), chosen


class Denoising:
    """The error of a denoising head on the test images; see `DeTTA`.

    The noise is drawn once per step. State: the generator.

    Args:
        denoise: `(model, noisy images) -> logits` of the images, of their shape.
        noise: "blind_spots" or "gaussian"; see `DeTTA`.
        strength: The share of the pixels that are blind, or the noise's standard deviation.
        generator: The generator of the noise, on the CPU; by default a new one with seed 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value; in a call, if the images are not in [0, 1],
            or the head's output has not their shape.

    Examples:
        >>> objective = Denoising(lambda model, images: torch.logit(images), strength=1.0)
        >>> objective(None, torch.full((1, 1, 4, 4), 0.25))
        tensor(0.)
    """

    def __init__(
        self,
        denoise: Head,
        noise: Noise = "blind_spots",
        strength: int | float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        if noise not in ("blind_spots", "gaussian"):
            raise ValueError(f'noise is {noise!r}; choose "blind_spots" or "gaussian"')
        check_number("strength", strength, above=0)
        if noise == "blind_spots":
            check_number("strength", strength, most=1)
        self.denoise, self.noise, self.strength = denoise, noise, strength
        self.generator = own_generator(generator)
        self._noisy: tuple[Tensor, Tensor] | None = None

    def begin_step(self, images: Tensor) -> None:
        """Draw new noise."""
        self._noisy = None

    def check_images(self, image: Tensor) -> None:
        """Check that these are floating-point images in [0, 1].

        Raises:
            ValueError: If they are not.
        """
        check_restorable("denoising", image)

    def __call__(self, model: Any, image: Image) -> Scalar | None:
        """The loss; None if no pixel is blind."""
        self.check_images(image)
        if self._noisy is None:
            self._noisy = self._draw(image)
        noisy, chosen = self._noisy
        error = restoration_error("denoise", self.denoise(model, noisy), image)
        if self.noise == "gaussian":
            return error.square().mean()
        errors = error.abs()[chosen.expand_as(error)]
        return errors.mean() if errors.numel() else None

    def _draw(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.noise == "blind_spots":
            return blind_spots(image, self.strength, self.generator)
        drawn = torch.randn(image.shape, generator=self.generator).to(image)
        return image + self.strength * drawn, torch.ones_like(image, dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.generator.set_state(state_dict["generator"].cpu())


class _InTraining:
    """The denoised images, in a pass of the whole network in which running statistics learn."""

    def __init__(self, denoise: Head) -> None:
        self.denoise = denoise

    def __call__(self, model: Any, images: Tensor) -> Tensor:
        with learning(model) as waiting:
            output = self.denoise(model, images)
            if waiting:  # the authors' network has one forward for both of its decoders
                with torch.no_grad():
                    model(images)
        return output


def DeTTA(  # noqa: N802 # the method's name
    model: nn.Module,
    denoise: Head,
    lr: float | None = None,
    statistics: str | Statistics | None = None,
    noise: Noise = "blind_spots",
    strength: int | float = 0.1,
    generator: torch.Generator | None = None,
    preset: Literal["online", "released"] = "online",
    **options: Any,
) -> Adapter:
    """Test-time adaptation by denoising (DeTTA, WACV 2024).

    [From Denoising Training to Test-Time Adaptation: Enhancing Domain Generalization for Medical
    Image Segmentation](https://arxiv.org/abs/2310.20271), with φ the scales and shifts of
    normalisation layers, and h a head that was trained on the source to remove noise:

        "blind_spots"   x̃ = x with 10% of the pixels replaced by a random one of the 5 × 5 around
                        L = mean over these of |σ(h(x̃)) − x|
        "gaussian"      x̃ = x + 0.1·N(0, 1)
                        L = mean of (σ(h(x̃)) − x)²
        φ ← φ − Adam(∇_φ L)
        predict x with φ

    Blind spots are Noise2Void's ([Krull et al., CVPR 2019](https://arxiv.org/abs/1811.10980)) and
    DeTTA's; "gaussian" is the denoising objective of [GraTa](https://arxiv.org/abs/2408.07343),
    which also compares DeTTA.

    | preset | lr | β₂ of Adam | statistics in the steps | and in predictions |
    |---|---|---|---|---|
    | "online" | 1e-4 | 0.999 | the test's | the test's |
    | "released" | 1e-6 | 0.99 | the batch's; running ones move, momentum 0.1 | the running ones |

    "online" is a comparable setting for streams; its learning rate is GraTa's for TENT. "released"
    are the settings of the authors' program, which trains for an epoch over the whole target, in
    batches of 8, before it predicts: see the example. At 1e-6 almost nothing is learnt but the
    running statistics, as in `DUA`. All of the network's layers move, with the layers that
    `denoise` does not run in one more pass. The authors draw blind spots with replacement, and past
    an edge from the other side of the image. Written from their program, which was not run.

    Cost: 2 forward passes, one of them through the head, and 1 backward pass per batch. State: φ,
    Adam's moments, the generator; of "released" the running statistics.

    Args:
        model: The source model with its head; see `Adapter`.
        denoise: `(model, noisy images) -> logits` of the images without noise, of their shape.
        lr: Adam's learning rate; by default the preset's.
        statistics: Where mean and variance come from; by default the preset's.
        noise: Which noise.
        strength: The share of the pixels that are blind, or the noise's standard deviation.
        generator: The generator of the noise, on the CPU; by default a new one with seed 0.
        preset: "online" or "released"; see above.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> class Network(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)
        ...         self.head, self.denoiser = torch.nn.Conv2d(4, 2, 1), torch.nn.Conv2d(4, 3, 1)
        ...     def forward(self, images):
        ...         return self.head(self.norm(self.first(images)))
        >>> def denoise(model, images):
        ...     return model.denoiser(model.norm(model.first(images)))
        >>> adapter = gk.tta.DeTTA(Network(), denoise)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])

        The whole target first, then its predictions:

        >>> adapter = gk.tta.DeTTA(Network(), denoise, preset="released")
        >>> target = torch.rand(16, 3, 8, 8)
        >>> for batch in target.split(8):
        ...     adapter.adapt(batch)
        >>> with torch.no_grad():
        ...     logits = adapter.model(target)
    """
    if preset not in ("online", "released"):
        raise ValueError(f'preset is {preset!r}; choose "online" or "released"')
    released = preset == "released"
    if statistics is None:
        statistics = RunningStatistics(0.1) if released else "test"
    rate = (1e-6 if released else 1e-4) if lr is None else lr
    betas = (0.9, 0.99 if released else 0.999)
    if released:
        denoise = _InTraining(denoise)
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": Denoising(denoise, noise, strength, generator)},
        **{
            "optimizer": functools.partial(torch.optim.Adam, lr=rate, betas=betas),
            "on_empty": "skip",
            **options,
        },
    )
