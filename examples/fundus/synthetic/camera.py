"""The camera of a synthetic centre: from an eye's reflectance to a photograph."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from examples.common.drawing import colour, gaussian_blur, normal, pixel_centres, uniform
from examples.fundus.synthetic.centres import Centre


def photograph(
    reflectance: Float[Tensor, "3 S S"],
    centre: Centre,
    generator: torch.Generator,
    temporal: float,
) -> Float[Tensor, "3 S S"]:
    """Take the picture: illumination, optics and sensor of a centre's camera; not yet stretched."""
    size = reflectance.shape[-1]
    x, y = pixel_centres(size)
    slope = centre.unevenness * torch.randn(2, generator=generator).clamp(-2, 2)
    axis = 0.5 + 0.12 * torch.randn(2, generator=generator).clamp(-2, 2)
    light = normal(generator, *centre.exposure) * (1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5))
    light = light * (1 - centre.vignetting * 2 * ((x - axis[0]) ** 2 + (y - axis[1]) ** 2))
    image = reflectance * light.clamp(min=0.05)

    # Scattered light: a glow round bright structures, and a veil over everything.
    small = F.interpolate(image[None], (32, 32), mode="bilinear", antialias=True)[0]
    glow = F.interpolate(gaussian_blur(small, 2.0)[None], (size, size), mode="bicubic")[0]
    haze = max(0.0, normal(generator, *centre.haze))
    veil = glow.mean((1, 2), keepdim=True) * colour((1.0, 1.1, 1.25))
    image = (0.86 - haze) * image + 0.14 * glow + haze * veil
    focus = centre.blur * float(uniform(generator, 0.7, 1.6))
    image = gaussian_blur(image, max(focus * size, 0.3))

    if centre.field_of_view is not None:
        # The disc lies on the nasal side of the retina's pole, so the aperture ends there.
        towards = float(uniform(generator, 0.0, 0.25)) * temporal
        height = 0.5 + 0.08 * torch.randn(1, generator=generator)
        distance = torch.hypot(x - 0.5 - towards, y - height)
        image = image * torch.sigmoid((centre.field_of_view - distance) / 0.006)

    image = colour(centre.gain) * image.clamp(min=0) ** colour(centre.gamma)
    grain = torch.randn(3, 256, 256, generator=generator)
    grain = F.interpolate(grain[None], (size, size), mode="bilinear", antialias=True)[0]
    # Photon noise grows with the root of the signal; the small constant is read-out noise.
    image = image + centre.noise * (image.clamp(min=0) + 0.02).sqrt() * grain
    return image.clamp(0, 1)
