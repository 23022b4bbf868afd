"""Weak and strong variants of training images, CutMix boxes: what consistency is asked between."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from examples.common.drawing import gaussian_blur, uniform


def draw_grid(count: int, size: int, generator: torch.Generator) -> Float[Tensor, "n h w 2"]:
    """Places that weakly augmented images are sampled at, in the coordinates of `F.grid_sample`.

    Rotation by up to 20°, scale 0.85 to 1.15, mirror to the left (p = 0.5), and a smooth
    deformation (p = 0.5) whose deviation is U(0, 2%) of the side. The kinds are MiDSS's; the
    deformation is drawn otherwise.

    Args:
        count: number of images.
        size: their side, pixels.
        generator: of the draws.
    """
    angle = math.radians(20) * uniform(generator, -1, 1, count)
    scale = uniform(generator, 0.85, 1.15, count)
    mirror = 1 - 2 * (uniform(generator, 0, 1, count) < 0.5).float()
    strength = uniform(generator, 0, 0.04, count) * (uniform(generator, 0, 1, count) < 0.5)
    bend = torch.randn(count, 2, 4, 4, generator=generator)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([mirror * cosine, -sine, mirror * sine, cosine], dim=1).reshape(-1, 2, 2)
    affine = torch.cat([rows, torch.zeros(count, 2, 1)], dim=2)
    grid = F.affine_grid(affine, [count, 1, size, size], align_corners=False)
    bend = F.interpolate(bend, (size, size), mode="bicubic", align_corners=False)
    return grid + strength.reshape(-1, 1, 1, 1) * bend.permute(0, 2, 3, 1)


def warp(
    image: Float[Tensor, "n c h w"], grid: Float[Tensor, "n h w 2"], mode: str = "bilinear"
) -> Float[Tensor, "n c h w"]:
    """Samples images at the places of a grid; beyond the border they go on with what is there."""
    return F.grid_sample(image, grid, mode, padding_mode="border", align_corners=False)


def strengthen(
    image: Float[Tensor, "c h w"], factors: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, "c h w"]:
    """A strong variant: brightness and contrast by random factors, and blur.

    Brightness multiplies intensities, contrast their distance from the mean, each by U(factors) and
    cut off at [0, 1]; the blur's deviation is U(0.1, 2) pixels per 256 of the side. The order and
    the ranges of brightness and contrast are MiDSS's, the blur's range is ours.

    Args:
        image: in [0, 1].
        factors: smallest and largest factor.
        generator: of the draws.
    """
    brightness, contrast = uniform(generator, *factors, count=2)
    blur = float(uniform(generator, 0.1, 2.0)) * image.shape[-1] / 256
    image = (image * brightness).clamp(0, 1)
    mean = image.mean()
    image = (mean + contrast * (image - mean)).clamp(0, 1)
    return gaussian_blur(image, blur)


def cutmix_box(size: int, generator: torch.Generator) -> Float[Tensor, "1 h w"]:
    """A mask that is 1 in a random box: 2 to 40% of the image, aspect ratio 0.3 to 1/0.3.

    Boxes that would not fit are drawn again. CutMix is of Yun et al., ICCV 2019,
    https://arxiv.org/abs/1905.04899; the ranges are MiDSS's.

    Example:
        >>> box = cutmix_box(100, torch.Generator().manual_seed(0))
        >>> 0.01 < box.mean() < 0.41
        tensor(True)
    """
    while True:
        area, logarithm = float(uniform(generator, 0.02, 0.4)), float(uniform(generator, -1, 1))
        aspect = math.exp(logarithm * math.log(1 / 0.3))
        height = round(size * math.sqrt(area * aspect))
        width = round(size * math.sqrt(area / aspect))
        top, left = (int(size * float(uniform(generator, 0, 1))) for _ in range(2))
        if top + height <= size and left + width <= size:
            box = torch.zeros(1, size, size)
            box[:, top : top + height, left : left + width] = 1
            return box
