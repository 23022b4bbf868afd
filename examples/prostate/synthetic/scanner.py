"""The scanner of a synthetic site: from a slice's signal to a picture."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from examples.common.drawing import fractal_noise, gaussian_blur, pixel_centres, uniform
from examples.prostate.synthetic.patient import Patient
from examples.prostate.synthetic.sites import Site

FULL_WIDTH = 2.355  # a Gaussian's full width at half maximum, in deviations


def acquire(
    signal: Float[Tensor, "S S"], patient: Patient, site: Site, generator: torch.Generator
) -> Float[Tensor, "S S"]:
    """The picture that a site's scanner makes: contrast, coil, resolution, noise, grey window.

    Returns:
        Levels of grey in [0, 1].
    """
    size = signal.shape[-1]
    image = signal.clamp(0, 1.3) ** site.contrast
    image = image * sensitivity(patient, site, generator, size)
    # Sampling blurs; at few pixels the picture's own grid is coarser.
    deviation = site.resolution / FULL_WIDTH / site.field_of_view * size
    image = gaussian_blur(image[None], deviation)[0] if deviation > 0.3 else image
    # The magnitude of a complex signal with Gaussian noise has a Rician distribution.
    noise = torch.randn(2, 256, 256, generator=generator) * site.noise
    noise = F.interpolate(noise[None], (size, size), mode="bilinear", antialias=True)[0]
    image = torch.hypot(image + noise[0], noise[1])
    window = torch.quantile(image.flatten(), torch.tensor([0.01, 1 - site.saturation]))
    low, high = window
    return ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def sensitivity(
    patient: Patient, site: Site, generator: torch.Generator, size: int
) -> Float[Tensor, "S S"]:
    """The coil's sensitivity over the image, about 1 in the gland.

    A surface coil's is smooth. That of an endorectal coil falls with the square of the distance
    from the rectum, so that the gland's front is dim.
    """
    u, v = pixel_centres(size)
    smooth = torch.exp(site.unevenness * fractal_noise(generator, u, v, (2, 3)))
    slope = float(uniform(generator, -1, 1)) * site.unevenness
    smooth = smooth * (1 + slope * (v - 0.5)).clamp(min=0.2)
    if not patient.coil:
        return smooth
    x, y = (u - 0.5) * site.field_of_view, (v - 0.5) * site.field_of_view
    middle = patient.middle[0], patient.middle[1] + patient.axes[1] + patient.rectum
    distance = torch.hypot(x - middle[0], y - middle[1])
    reach = patient.rectum + patient.axes[1]  # to the middle of the gland
    near = 2.2 / (1 + 1.2 * (distance / reach) ** 2)
    return smooth * near.clamp(max=3) + 0.04
