"""Images in the frequency domain, in any number of spatial dimensions."""

import torch
from jaxtyping import Float
from torch import Tensor


def mix_amplitude(
    image: Float[Tensor, "*shape"],
    other: Float[Tensor, "*shape"],
    degree: float | Float[Tensor, "..."],
    dimensions: int,
    share: float = 0.01,
) -> Float[Tensor, "*shape"]:
    """Gives an image the low-frequency amplitudes of another one, and with them its appearance.

    After Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR 2020,
    https://arxiv.org/abs/2004.05498, with a degree as in FedDG (Liu et al., CVPR 2021,
    https://arxiv.org/abs/2103.06030): within the box of frequencies |k| ≤ ⌊share·size⌋, where size
    is the shorter side, the amplitude becomes (1 − degree)·image's + degree·other's. The phase,
    which holds the shapes, stays.

    Args:
        image: whose last dimensions are spatial.
        other: of the same shape.
        degree: from 0 (the image itself) to 1; a number or a tensor that broadcasts.
        dimensions: number of spatial dimensions.
        share: of the spectrum on either side of frequency 0, along each axis.

    Example:
        >>> dark, bright = torch.full((1, 4, 4), 0.25), torch.ones(1, 4, 4)
        >>> mix_amplitude(dark, bright, 1.0, dimensions=2)[0, 0, 0].item()
        1.0
    """
    space = tuple(range(-dimensions, 0))
    spectrum, style = torch.fft.fftn(image, dim=space), torch.fft.fftn(other, dim=space)
    reach = int(min(image.shape[-dimensions:]) * share)
    low = torch.ones((), dtype=torch.bool, device=image.device)
    for axis, size in zip(space, image.shape[-dimensions:], strict=True):
        near = torch.fft.fftfreq(size, 1 / size, device=image.device).abs() <= reach
        low = low & near.reshape([-1] + [1] * (-axis - 1))
    amplitude = spectrum.abs()
    mixed = torch.where(low, (1 - degree) * amplitude + degree * style.abs(), amplitude)
    return torch.fft.ifftn(torch.polar(mixed, spectrum.angle()), dim=space).real
