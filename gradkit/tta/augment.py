"""Strong augmentation of images: brightness, contrast, gamma, noise and blur.

All functions are batched, run on the device of the image, and do not change their input. Random
numbers come from a `torch.Generator`, which may be on the CPU or on another device. Numbers are
drawn there and copied to the image's device, so a CPU generator gives the same augmentation on
every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
PerSample = Float[Tensor, " batch"]
PerChannel = Float[Tensor, "batch channels"]
Range = tuple[float, float]

_OVERSHOOT = 0.1  # of bicubic interpolation at an edge from 0 to 1


def minmax(
    image: Float[Tensor, "batch channels *spatial"],
) -> Float[Tensor, "batch channels *spatial"]:
    """Each image scaled to [0, 1], jointly over its channels; a constant image becomes zeros.

    Examples:
        >>> minmax(torch.tensor([[[[2.0, 4.0]], [[6.0, 4.0]]]])).flatten().tolist()
        [0.0, 0.5, 1.0, 0.5]
    """
    dims = tuple(range(1, image.dim()))
    low = image.amin(dim=dims, keepdim=True)
    extent = image.amax(dim=dims, keepdim=True) - low
    return (image - low) / torch.where(extent > 0, extent, 1.0)


def adjust_brightness(image: Images, factor: PerChannel) -> Images:
    """Each channel multiplied by its factor.

    Examples:
        >>> adjust_brightness(torch.ones(1, 2, 1, 1), torch.tensor([[0.5, 2.0]])).flatten()
        tensor([0.5000, 2.0000])
    """
    return image * factor[..., None, None]


def adjust_contrast(image: Images, factor: PerChannel) -> Images:
    """Each channel scaled about its mean by its factor, then clipped to the range it had.

    Examples:
        >>> adjust_contrast(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[0.5]])).flatten()
        tensor([0.2500, 0.7500])
    """
    mean = image.mean(dim=(2, 3), keepdim=True)
    stretched = (image - mean) * factor[..., None, None] + mean
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    return stretched.clamp(low, high)


def adjust_gamma(image: Images, exponent: PerChannel, invert: bool = False) -> Images:
    """Each channel raised to its exponent within its own range; minimum and maximum are kept.

    With `invert`, this is applied to the negated image:
    x ↦ max − (max − min)·((max − x)/(max − min))^γ, so that γ > 1 brightens. Mean and standard
    deviation change. (batchgenerators can restore them, with `retain_stats`; GraTa does not.)

    Examples:
        >>> image, exponent = torch.tensor([[[[0.0, 0.5, 1.0]]]]), torch.tensor([[2.0]])
        >>> adjust_gamma(image, exponent).flatten()
        tensor([0.0000, 0.2500, 1.0000])
        >>> adjust_gamma(image, exponent, invert=True).flatten()
        tensor([0.0000, 0.7500, 1.0000])
    """
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    extent = high - low
    rise = (high - image if invert else image - low) / torch.where(extent > 0, extent, 1.0)
    bent = extent * rise ** exponent[..., None, None]
    return high - bent if invert else low + bent


def add_noise(image: Images, sigma: PerSample, generator: torch.Generator) -> Images:
    """The image plus Gaussian noise of standard deviation `sigma`, for all channels of an image.

    Examples:
        >>> noisy = add_noise(torch.zeros(1, 1, 64, 64), torch.tensor([0.1]), torch.Generator())
        >>> round(noisy.std().item(), 2)
        0.1
    """
    noise = torch.randn(
        image.shape, generator=generator, device=generator.device, dtype=torch.float32
    )
    return image + sigma[:, None, None, None] * noise.to(image)


def gaussian_blur(image: Images, sigma: PerChannel, radius: int | None = None) -> Images:
    """Each channel convolved with a Gaussian of its own standard deviation, in pixels.

    The kernel is truncated at 4 σ (radius ⌊4σ + ½⌋). The image is extended by reflection about its
    edges (d c b a | a b c d | d c b a), however small it is. These are the defaults of
    `scipy.ndimage.gaussian_filter`, which batchgenerators uses. σ = 0 does not change a channel.

    The sum over taps is written explicitly, since a convolution would run in reduced precision
    under autocast and, on GPUs, in TF32.

    Args:
        image: [N, C, H, W].
        sigma: [N, C], at least 0.
        radius: The largest kernel radius; a larger σ is truncated there. By default the radius of
            the largest σ, which synchronises with the device.

    Examples:
        >>> gaussian_blur(torch.eye(3)[None, None], torch.tensor([[0.5]]))[0, 0, 1]
        tensor([0.1793, 0.6415, 0.1793])
    """
    if radius is None:
        radius = _kernel_radius(float(sigma.max()))
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=sigma.dtype)
    width = sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[..., None]  # 0/0 at σ = 0 otherwise
    inside = offset.abs() <= torch.floor(4 * sigma[..., None] + 0.5)
    kernel = torch.where(inside, torch.exp(-0.5 * (offset / width).square()), 0.0)
    kernel = kernel / kernel.sum(dim=-1, keepdim=True)

    for dim in (2, 3):
        size = image.shape[dim]
        padded = image.index_select(dim, _reflected(size, radius, image.device))
        image = torch.zeros_like(image)
        for tap in range(2 * radius + 1):
            image = image + kernel[..., tap, None, None] * padded.narrow(dim, tap, size)
    return image


def range_outside(image: Tensor) -> tuple[float, float] | None:
    """The least and the largest value of images that are not in [0, 1]; None if they are.

    Values may exceed the range by a tenth, as after interpolation. Images that are not finite
    count as inside.

    Examples:
        >>> range_outside(torch.eye(4)), range_outside(2 * torch.eye(4))
        (None, (0.0, 2.0))
    """
    if not image.numel():
        return None
    low, high = torch.aminmax(image.detach())
    outside = ((low < -_OVERSHOOT) | (high > 1 + _OVERSHOOT)) & torch.isfinite(high - low)
    return (float(low), float(high)) if outside else None  # one copy from the device if inside


@dataclass(frozen=True)
class StrongAugmentation:
    """GraTa's strong augmentation of images in [0, 1] (https://arxiv.org/abs/2408.07343).

    The operations, in this order, are brightness, contrast, gamma of the negated image, noise and
    blur. Each is applied to an image with its own probability, independently of other images. Its
    strength is drawn for each channel (for noise, for each image). For contrast and gamma, half of
    the strengths are between the low end of the range and 1, half between 1 and the high end. In a
    blurred image, each channel is blurred with `blur_channel_probability`. The result is not
    clipped to [0, 1].

    The paper always applies all five; these probabilities are those of the released code. The
    number of random numbers drawn depends only on the image's shape.

    Args:
        brightness_probability: Chance of `adjust_brightness` for an image.
        brightness_range: Its factor.
        contrast_probability: Chance of `adjust_contrast`.
        contrast_range: Its factor; contains 1.
        gamma_probability: Chance of `adjust_gamma`.
        gamma_range: Its exponent; contains 1.
        noise_probability: Chance of `add_noise`.
        noise_range: Its standard deviation.
        blur_probability: Chance of `gaussian_blur`.
        blur_channel_probability: Chance that a channel of a blurred image is blurred.
        blur_range: Its standard deviation, in pixels.

    Raises:
        ValueError: If a probability is outside [0, 1], a range is negative or reversed, or a range
            that must contain 1 does not.

    Examples:
        >>> image = torch.rand(2, 3, 16, 16)
        >>> strong = StrongAugmentation()(image, torch.Generator().manual_seed(0))
        >>> strong.shape, torch.equal(strong, image)
        (torch.Size([2, 3, 16, 16]), False)
    """

    brightness_probability: float = 0.75
    brightness_range: Range = (0.5, 1.5)
    contrast_probability: float = 0.75
    contrast_range: Range = (0.5, 1.5)
    gamma_probability: float = 0.75
    gamma_range: Range = (0.5, 2.0)
    noise_probability: float = 0.5
    noise_range: Range = (0.0, 0.05)
    blur_probability: float = 0.5
    blur_channel_probability: float = 0.5
    blur_range: Range = (0.5, 1.5)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability"):
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"{field.name} must lie in [0, 1], but is {value}.")
                continue
            low, high = value
            if not 0.0 <= low <= high < math.inf:
                raise ValueError(f"{field.name} must be (low, high), 0 ≤ low ≤ high, not {value}.")
            if field.name in ("contrast_range", "gamma_range") and not low <= 1.0 <= high:
                raise ValueError(f"{field.name} must contain 1, but is {value}.")

    def check_images(self, image: Tensor) -> None:
        """Check that these are floating-point images [N, C, H, W] in [0, 1].

        Values may exceed the range by a tenth, as after interpolation. Images that are not finite
        are accepted; the step handles them (`nonfinite=`).

        Raises:
            ValueError: If they are not.

        Examples:
            >>> StrongAugmentation().check_images(torch.eye(4)[None, None])
        """
        if image.dim() != 4:
            raise ValueError(
                "the strong augmentation works on images [N, C, H, W], but these have the shape "
                f"{list(image.shape)}. Volumes need an augmentation of their own, a function of "
                "images and generator: augmentation=... of RoTTA, DistilledFuse or Consistency; "
                "GraTa takes GraTa(pseudo=Consistency(augmentation=...))."
            )
        if not image.is_floating_point():
            raise ValueError(
                "the strong augmentation works on floating-point images in [0, 1], but these are "
                f"{image.dtype}: pass images.float(), divided by the largest possible value."
            )
        outside = range_outside(image)
        if outside is not None:
            low, high = outside
            raise ValueError(
                f"the strong augmentation works on images in [0, 1], but these lie in [{low:.4g}, "
                f"{high:.4g}]: scale them to [0, 1]. If the model was trained on images that are "
                "normalised by mean and standard deviation, make the normalisation its first "
                "layer, torch.nn.Sequential(normalise, model), and adapt that. Images of another "
                "range need an augmentation of their own: Consistency(augmentation=...)."
            )

    def __call__(self, image: Images, generator: torch.Generator) -> Images:
        """Augment [N, C, H, W], drawing from `generator`.

        Raises:
            ValueError: If the image is not a batch of floating-point images in [0, 1].
        """
        self.check_images(image)
        samples, channels = image.shape[:1], image.shape[:2]
        draw = _Draw(generator, image)

        happens = draw.chosen(samples, self.brightness_probability)
        factor = draw.uniform(channels, self.brightness_range)
        image = _replace(image, happens, adjust_brightness(image, factor))

        happens = draw.chosen(samples, self.contrast_probability)
        factor = draw.around_one(channels, self.contrast_range)
        image = _replace(image, happens, adjust_contrast(image, factor))

        happens = draw.chosen(samples, self.gamma_probability)
        exponent = draw.around_one(channels, self.gamma_range)
        image = _replace(image, happens, adjust_gamma(image, exponent, invert=True))

        happens = draw.chosen(samples, self.noise_probability)
        sigma = draw.uniform(samples, self.noise_range)
        image = _replace(image, happens, add_noise(image, sigma, generator))

        happens = draw.chosen(samples, self.blur_probability)
        hit = draw.chosen(channels, self.blur_channel_probability)
        sigma = torch.where(hit, draw.uniform(channels, self.blur_range), 0.0)
        radius = _kernel_radius(self.blur_range[1])
        return _replace(image, happens, gaussian_blur(image, sigma, radius))


@dataclass(frozen=True)
class _Draw:
    """Random numbers drawn on the generator's device, in the dtype and on the device of `like`."""

    generator: torch.Generator
    like: Tensor

    def chosen(self, shape: torch.Size, probability: float) -> Tensor:
        """Booleans, true with `probability`."""
        return (self._unit(shape) < probability).to(self.like.device)

    def uniform(self, shape: torch.Size, bounds: Range) -> Tensor:
        """Uniform between the bounds."""
        low, high = bounds
        return (low + (high - low) * self._unit(shape)).to(self.like)

    def around_one(self, shape: torch.Size, bounds: Range) -> Tensor:
        """With equal chances, uniform between the low bound and 1 or between 1 and the high one."""
        low, high = bounds
        weaker = self.chosen(shape, 0.5)
        return torch.where(
            weaker, self.uniform(shape, (low, 1.0)), self.uniform(shape, (1.0, high))
        )

    def _unit(self, shape: torch.Size) -> Tensor:
        # Always float32, so that a seed gives the same numbers for images of any precision.
        device = self.generator.device
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float32)


def _replace(image: Tensor, happens: Tensor, changed: Tensor) -> Tensor:
    """`changed` for the samples where `happens` [N] is true, `image` for the others."""
    return torch.where(happens[:, None, None, None], changed, image)


def _kernel_radius(sigma: float) -> int:
    return math.floor(4 * sigma + 0.5)


def _reflected(size: int, radius: int, device: torch.device) -> Tensor:
    """Indices that extend 0 … size − 1 by `radius` on both sides, reflected about the edges."""
    index = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)
