"""From a patch of a source centre to a patch of a made-up target centre.

Geometry is shared with the label; appearance is not: intensity, noise, smoothing, histogram shift
and a bias field (MONAI's), and a random shallow network (GIN).
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from monai.transforms import (
    Compose,
    RandAffined,
    RandBiasField,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandHistogramShift,
    RandScaleIntensity,
    RandShiftIntensity,
)
from torch import Tensor

IMAGE, TARGET = "image", "target"
BOTH = (IMAGE, TARGET)
MODES = ("bilinear", "nearest")  # a mask stays {0, 1}
LAYERS, CHANNELS = 4, 2  # of GIN
KERNELS = (1, 3)


def build_geometry() -> Compose:
    """The random geometry of a dictionary of `image` [1, …] and `target` [2, …].

    Rotation by up to 15° about each axis and scale 0.85 to 1.15 (p = 0.3); mirror along each axis
    (p = 0.5). Beyond the border both continue with their outermost voxels.
    """
    angle = math.radians(15)
    return Compose(
        [
            RandAffined(
                BOTH,
                prob=0.3,
                rotate_range=(angle, angle, angle),
                scale_range=(0.15, 0.15, 0.15),
                mode=MODES,
                padding_mode="border",
            ),
            *(RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )


def build_appearance() -> Compose:
    """The random appearance of an image [1, …] of mean 0 and standard deviation about 1.

    In order: contrast × U(0.7, 1.3), shift by U(−0.3, 0.3), histogram shift with ten control
    points, a bias field of degree 3, Gaussian smoothing of 0.3 to 1 voxels, Gaussian noise of
    standard deviation up to 0.2; each with probability 0.5. The paper names the operations and not
    their strength.
    """
    return Compose(
        [
            RandScaleIntensity(factors=0.3, prob=0.5),
            RandShiftIntensity(offsets=0.3, prob=0.5),
            RandHistogramShift(num_control_points=10, prob=0.5),
            RandBiasField(degree=3, coeff_range=(0.0, 0.2), prob=0.5),
            RandGaussianSmooth(
                sigma_x=(0.3, 1.0), sigma_y=(0.3, 1.0), sigma_z=(0.3, 1.0), prob=0.5
            ),
            RandGaussianNoise(std=0.2, prob=0.5),
        ]
    )


def vary(transform: Compose, data: Any, seed: int) -> Any:
    """Applies a random transform whose draws are a function of the seed; returns plain tensors."""
    transform.set_random_state(seed=seed)
    varied = transform(data)
    if isinstance(varied, dict):
        return {name: _plain(value) for name, value in varied.items()}
    return _plain(varied)


def gin(image: Float[Tensor, "1 ..."], generator: torch.Generator) -> Float[Tensor, "1 ..."]:
    """An image through a random shallow network, blended with the image (GIN).

    Ouyang et al., "Causality-inspired single-source domain generalization",
    https://arxiv.org/abs/2111.12525: four convolutions with two channels in between, kernels of 1
    or 3 drawn by layer, weights and biases from N(0, 1), leaky ReLU except after the last; then
    a·network + (1 − a)·image with a from U(0, 1), rescaled to the Frobenius norm of the image.

    Args:
        image: In two or three spatial dimensions.
        generator: On the CPU.
    """
    dimensions = image.ndim - 1
    convolve: Any = {2: F.conv2d, 3: F.conv3d}[dimensions]
    out = image[None]
    for layer in range(LAYERS):
        kernel = KERNELS[int(torch.randint(len(KERNELS), (), generator=generator))]
        channels = CHANNELS if layer < LAYERS - 1 else image.shape[0]
        shape = (channels, out.shape[1], *dimensions * [kernel])
        weight = torch.randn(shape, generator=generator)
        bias = torch.randn(channels, generator=generator)
        out = convolve(out, weight, bias, padding=kernel // 2)
        if layer < LAYERS - 1:
            out = F.leaky_relu(out)
    share = torch.rand((), generator=generator)
    mixed = share * out[0] + (1 - share) * image
    return mixed * (image.norm() / mixed.norm().clamp(min=1e-8))


def blend_field(
    space: tuple[int, ...] | torch.Size, generator: torch.Generator, cells: int = 4
) -> Float[Tensor, "1 ..."]:
    """A smooth random field from 0 to 1: a coarse grid of random numbers, interpolated (IPA).

    Args:
        space: Two or three sides, voxels.
        generator: On the CPU.
        cells: Nodes of the grid along each axis.
    """
    grid = torch.rand(1, 1, *len(space) * [cells], generator=generator)
    mode = {2: "bilinear", 3: "trilinear"}[len(space)]
    return F.interpolate(grid, tuple(space), mode=mode, align_corners=True)[0]


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A generator of torch, seeded from one of NumPy."""
    return torch.Generator().manual_seed(int(rng.integers(2**31)))


def _plain(value: Any) -> Tensor:
    return torch.Tensor.as_subclass(torch.as_tensor(value), torch.Tensor).contiguous()
