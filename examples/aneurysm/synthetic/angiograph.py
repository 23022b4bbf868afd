"""The angiograph of a synthetic centre: from anatomy to grey levels."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from examples.aneurysm.synthetic.anatomy import Anatomy
from examples.aneurysm.synthetic.centres import Centre


def acquire(
    anatomy: Anatomy,
    vessels: Float[Tensor, "S S S"],
    sacs: Float[Tensor, "S S S"],
    centre: Centre,
    generator: torch.Generator,
) -> Float[Tensor, "S S S"]:
    """Takes the volume: contrast medium, tissue, beam hardening, resolution, noise, grey levels.

    The first axis runs along the head, which the angiograph turns round.

    Args:
        anatomy: Of the patient, whose aneurysms streaks start from.
        vessels: Depth in the vessels, mm.
        sacs: Depth in the aneurysms, mm.
        centre: Whose angiograph.
        generator: Source of randomness.
    """
    size = vessels.shape[-1]
    voxel = centre.field_of_view / size
    ticks = (torch.arange(size) + 0.5) / size * 2 - 1
    z, y, x = torch.meshgrid(ticks, ticks, ticks, indexing="ij")

    # A voxel on a surface is filled in part.
    vessel = (0.5 + vessels / voxel).clamp(0, 1)
    sac = (0.5 + sacs / voxel).clamp(0, 1)
    image = torch.maximum(vessel, (1 - centre.mixing) * sac)
    density = image
    image = image + centre.texture * _smooth_noise(generator, size, 12)
    image = image + centre.bone * _skull_base(generator, x, y, z)
    image = image * (1 - centre.cupping * (1 - (x.square() + y.square()) / 2))
    image = image + centre.streaks * _streaks(anatomy, centre, density, generator, y, x)
    image = image * torch.exp(centre.bias * _smooth_noise(generator, size, 3))

    image = gaussian_blur(image, centre.blur / voxel)
    if centre.slice_thickness > voxel:
        image = _average_slices(image, centre.slice_thickness / voxel)
    grain = gaussian_blur(torch.randn(size, size, size, generator=generator), centre.grain / voxel)
    image = image + centre.noise * grain / grain.std()
    image = image.sign() * image.abs() ** centre.gamma
    if centre.floor is not None:
        image = image.clamp(min=centre.floor) - centre.floor
    return centre.offset + centre.scale * image


def gaussian_blur(image: Float[Tensor, "D H W"], deviation: float) -> Float[Tensor, "D H W"]:
    """Blurs by a Gaussian of `deviation` voxels along each axis; borders continue."""
    if deviation < 0.1:
        return image
    reach = max(1, math.ceil(3 * deviation))
    offset = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offset / deviation) ** 2)
    kernel = kernel / kernel.sum()
    blurred = F.pad(image[None, None], [reach] * 6, mode="replicate")
    for axis in range(3):
        shape = [1] * 5
        shape[2 + axis] = len(kernel)
        blurred = F.conv3d(blurred, kernel.reshape(shape))
    return blurred[0, 0]


def _smooth_noise(generator: torch.Generator, size: int, cells: int) -> Float[Tensor, "S S S"]:
    """Noise on a lattice of `cells` over the volume, interpolated; about unit variance."""
    lattice = torch.randn(1, 1, cells, cells, cells, generator=generator)
    noise = F.interpolate(lattice, (size, size, size), mode="trilinear", align_corners=True)[0, 0]
    return 1.5 * noise


def _skull_base(generator: torch.Generator, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Pieces of a bowl of bone behind the vessels, 0 to 1."""
    shift = 0.3 * torch.randn(3, generator=generator).clamp(-2, 2)
    distance = ((x - shift[0]) ** 2 + (y - shift[1]) ** 2 + (z - 0.2) ** 2).sqrt()
    shell = torch.exp(-(((distance - 1.05) / 0.06) ** 2))
    pieces = _smooth_noise(generator, x.shape[-1], 6)
    return shell * (pieces > 0) * (0.6 + 0.4 * torch.sigmoid(2 * pieces))


def _streaks(
    anatomy: Anatomy,
    centre: Centre,
    density: Tensor,
    generator: torch.Generator,
    y: Tensor,
    x: Tensor,
) -> Tensor:
    """Dark and bright rays from the first aneurysm, in slices with dense contrast medium."""
    middle = anatomy.sacs[0].centre / (centre.field_of_view / 2)
    angle = torch.atan2(y - middle[1], x - middle[2])
    distance = torch.hypot(y - middle[1], x - middle[2])
    rays = torch.zeros_like(x)
    for waves in (5, 9, 14):
        phase = 2 * math.pi * torch.rand((), generator=generator)
        rays = rays + torch.sin(waves * angle + phase) / 1.2
    dense = density.mean((1, 2))
    dense = dense / dense.amax().clamp(min=1e-6)
    return rays * torch.exp(-distance / 0.8) * dense[:, None, None]


def _average_slices(image: Float[Tensor, "D H W"], voxels: float) -> Float[Tensor, "D H W"]:
    """Averages along the first axis over slices of some voxels, and interpolates between them."""
    depth, height, width = image.shape
    slices = max(2, round(depth / voxels))
    thick = F.adaptive_avg_pool3d(image[None, None], (slices, height, width))
    thin = F.interpolate(thick, (depth, height, width), mode="trilinear", align_corners=False)
    return thin[0, 0]
