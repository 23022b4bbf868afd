"""What synthetic images are drawn with: random numbers, coordinates, textures, colours, blur.

Textures are defined on the unit square and only evaluated at the pixels, and no random draw depends
on their number.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Colour = tuple[float, float, float]


def uniform(generator: torch.Generator, low: float, high: float, count: int = 1) -> Tensor:
    """Draw `count` numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(count, generator=generator)


def normal(generator: torch.Generator, mean: float, deviation: float, limit: float = 2.0) -> float:
    """Draw one number, cut off at `limit` deviations: no eye is an outlier beyond anatomy."""
    draw = float(torch.randn((), generator=generator))
    return mean + deviation * max(-limit, min(limit, draw))


def pixel_centres(size: int) -> tuple[Float[Tensor, "S S"], Float[Tensor, "S S"]]:
    """Coordinates x (to the right) and y (down) of a square image's pixels, on the unit square."""
    ticks = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return x, y


def lattice_noise(
    lattice: Float[Tensor, "M N"], x: Float[Tensor, "S S"], y: Float[Tensor, "S S"]
) -> Float[Tensor, "S S"]:
    """Evaluate a lattice of random numbers over the unit square at any point, smoothly."""
    grid = torch.stack([2 * x - 1, 2 * y - 1], dim=-1)[None]
    return F.grid_sample(
        lattice[None, None], grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )[0, 0]


def fractal_noise(
    generator: torch.Generator,
    x: Float[Tensor, "S S"],
    y: Float[Tensor, "S S"],
    cells: Sequence[int],
    persistence: float = 0.6,
) -> Float[Tensor, "S S"]:
    """Sum noise over several scales to about unit variance.

    Scales the pixels cannot resolve are drawn (the next random numbers must not depend on the size)
    and left out (they would alias).
    """
    total = torch.zeros_like(x)
    for level, count in enumerate(cells):
        lattice = torch.randn(count, count, generator=generator)
        if 2 * count <= x.shape[-1]:
            total += persistence**level * lattice_noise(lattice, x, y)
    return total * 1.4 / math.sqrt(sum(persistence ** (2 * k) for k in range(len(cells))))


def wavy_circle(
    generator: torch.Generator, angle: Float[Tensor, "S S"], deviation: float
) -> Float[Tensor, "S S"]:
    """Radius of a roughly circular outline at each angle: 1 and a few Fourier terms."""
    outline = torch.ones_like(angle)
    for order in range(2, 6):
        amplitude = deviation / (order - 1) * torch.randn(1, generator=generator)
        outline += amplitude * torch.cos(order * angle + uniform(generator, 0, 2 * math.pi))
    return outline


def colour(value: Colour | Tensor) -> Float[Tensor, "3 1 1"]:
    """A colour as a factor for images."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(3, 1, 1)


def gaussian_blur(image: Float[Tensor, "C S S"], deviation: float) -> Float[Tensor, "C S S"]:
    """Blur by a Gaussian of `deviation` pixels; edges are mirrored."""
    reach = min(max(1, math.ceil(3 * deviation)), image.shape[-1] - 1)
    offset = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offset / max(deviation, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    padded = F.pad(image[:, None], [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None]), kernel[..., None])[:, 0]
