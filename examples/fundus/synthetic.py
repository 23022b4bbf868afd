"""Synthetic multi-centre fundus photographs: disc-centred crops with exact disc and cup masks.

No image of a patient is needed to run the example: an eye is drawn as geometry and reflectance
(pigment, choroid, nerve fibres, atrophy, disc, cup, vessels), then photographed by a centre's
camera (illumination, optics, sensor). Centres differ in both their patients and their camera, so
that a model trained at one of them degrades at another.

Everything is defined on the unit square and only evaluated at the pixels, and no random draw
depends on their number, so an eye is the same at any size. Vessels are cylinders of absorbing blood
(Beer-Lambert's law), which makes thin ones faint and crossings dark without further rules.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["all", "train", "test"]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Sample:
    """One photograph and its segmentation.

    Attributes:
        name: Path of the image, relative to the root of its data.
        image: Red, green, blue in [0, 1], float32.
        target: The nested channels [disc with cup, cup], each 0 or 1, float32.
    """

    name: str
    image: Float[Tensor, "3 S S"]
    target: Float[Tensor, "2 S S"]


def normalise(image: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
    """Stretch an image to [0, 1] by the minimum and maximum over all its channels together.

    A constant image has no contrast to stretch and becomes zeros.
    """
    low, high = image.amin(), image.amax()
    return (image - low) / torch.where(high > low, high - low, torch.ones_like(high))


@dataclass(frozen=True)
class Centre:
    """The statistics of one centre: its patients, then its camera.

    Lengths are fractions of the image's side; a pair is a normal distribution's (mean, deviation).

    Attributes:
        disc_radius: Mean radius of the disc.
        cup_to_disc: Ratio of the cup's to the disc's mean radius.
        jitter: Deviation of the disc's centre from the image's, along each axis.
        pigment: Reflectance of the fundus in red, green, blue.
        rim: Reflectance of the neuroretinal rim.
        cup: Reflectance of the cup.
        pigment_spread: Relative deviation of reflectance between eyes.
        tessellation: Visibility of the choroid's vessels, about 0 to 1.
        atrophy: Probability of peripapillary atrophy.
        exposure: Brightness of the flash.
        unevenness: Deviation of the illumination's slope across the image.
        gain: Response of the sensor's channels, a factor each.
        gamma: Exponent each channel's signal is raised to.
        haze: Share of stray light, from cloudy media or the lens.
        blur: Deviation of the Gaussian point spread.
        noise: Deviation of the sensor's noise at full signal.
        vignetting: Relative loss of light in the corners.
        field_of_view: Radius of the camera's aperture, None where the crop lies within it.
    """

    disc_radius: tuple[float, float]
    cup_to_disc: tuple[float, float]
    jitter: float
    pigment: Colour
    rim: Colour
    cup: Colour
    pigment_spread: float
    tessellation: float
    atrophy: float
    exposure: tuple[float, float]
    unevenness: float
    gain: Colour
    gamma: Colour
    haze: tuple[float, float]
    blur: float
    noise: float
    vignetting: float
    field_of_view: float | None


CENTRES: dict[str, Centre] = {
    # A glaucoma clinic: brown fundi in yellowish light, large cups, sharp optics.
    "centre_a": Centre(
        disc_radius=(0.335, 0.012), cup_to_disc=(0.64, 0.11), jitter=0.02,
        pigment=(0.47, 0.23, 0.08), rim=(0.74, 0.36, 0.12), cup=(0.90, 0.66, 0.26),
        pigment_spread=0.16, tessellation=0.35, atrophy=0.35,
        exposure=(1.0, 0.12), unevenness=0.25, gain=(1.0, 1.0, 1.0), gamma=(1.0, 1.0, 1.0),
        haze=(0.05, 0.04), blur=0.005, noise=0.012, vignetting=0.25, field_of_view=None,
    ),
    # A population screening: red, saturated colours, small cups, contrasty.
    "centre_b": Centre(
        disc_radius=(0.32, 0.022), cup_to_disc=(0.44, 0.12), jitter=0.035,
        pigment=(0.46, 0.19, 0.095), rim=(0.66, 0.29, 0.15), cup=(0.86, 0.62, 0.38),
        pigment_spread=0.20, tessellation=0.5, atrophy=0.25,
        exposure=(1.0, 0.15), unevenness=0.3, gain=(1.03, 0.95, 1.15), gamma=(0.95, 1.08, 1.0),
        haze=(0.05, 0.04), blur=0.004, noise=0.010, vignetting=0.35, field_of_view=None,
    ),
    # An older population: bright and pinkish, cataract's haze, the disc fills the crop.
    "centre_c": Centre(
        disc_radius=(0.37, 0.018), cup_to_disc=(0.50, 0.16), jitter=0.015,
        pigment=(0.58, 0.27, 0.16), rim=(0.74, 0.37, 0.20), cup=(0.88, 0.74, 0.46),
        pigment_spread=0.14, tessellation=0.3, atrophy=0.45,
        exposure=(0.98, 0.10), unevenness=0.2, gain=(1.02, 1.0, 1.05), gamma=(0.8, 0.85, 0.85),
        haze=(0.22, 0.09), blur=0.010, noise=0.010, vignetting=0.1, field_of_view=None,
    ),
    # An underexposed camera: dark orange-red fundi, noise, dim corners.
    "centre_d": Centre(
        disc_radius=(0.345, 0.018), cup_to_disc=(0.46, 0.15), jitter=0.025,
        pigment=(0.42, 0.18, 0.07), rim=(0.60, 0.29, 0.12), cup=(0.80, 0.62, 0.28),
        pigment_spread=0.22, tessellation=0.4, atrophy=0.5,
        exposure=(0.78, 0.13), unevenness=0.5, gain=(0.98, 1.0, 0.95), gamma=(1.2, 1.25, 1.2),
        haze=(0.03, 0.03), blur=0.006, noise=0.028, vignetting=0.55, field_of_view=None,
    ),
    # A hand-held camera: a wider crop at the edge of its aperture, greyish colours, soft.
    "centre_e": Centre(
        disc_radius=(0.225, 0.02), cup_to_disc=(0.50, 0.12), jitter=0.05,
        pigment=(0.48, 0.24, 0.12), rim=(0.66, 0.36, 0.19), cup=(0.84, 0.66, 0.42),
        pigment_spread=0.11, tessellation=0.45, atrophy=0.3,
        exposure=(0.95, 0.12), unevenness=0.4, gain=(0.92, 1.02, 1.0), gamma=(1.0, 0.95, 0.95),
        haze=(0.12, 0.06), blur=0.009, noise=0.022, vignetting=0.4, field_of_view=0.62,
    ),
}  # fmt: skip
"""Five centres; the first four resemble tight crops of the disc, the last a wide one."""


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


def grow(
    origin: Float[Tensor, "V 2"],
    heading: Float[Tensor, "V T"],
    length: Float[Tensor, " V"],
) -> Float[Tensor, "V T 2"]:
    """Integrate headings (radians, from the x axis towards y) into curves of given lengths."""
    step = (length / heading.shape[1])[:, None]
    steps = torch.stack([step * heading.cos(), step * heading.sin()], dim=-1)
    return origin[:, None] + steps.cumsum(1) - steps[:, :1]


def meander(generator: torch.Generator, vessels: int, points: int, amplitude: float) -> Tensor:
    """Deviations of heading, in radians, along vessels: a slow and two faster waves; [V, T]."""
    along = torch.linspace(0, 1, points)
    total = torch.zeros(vessels, points)
    for waves, share in ((1.0, 0.6), (2.7, 0.6), (5.5, 0.45), (11.0, 0.2)):
        strength = amplitude * share * torch.randn(vessels, 1, generator=generator)
        phase = uniform(generator, 0, 2 * math.pi, vessels)[:, None]
        frequency = waves * uniform(generator, 0.7, 1.3, vessels)[:, None]
        total += strength * torch.sin(2 * math.pi * frequency * along + phase)
    return total


def branch(
    generator: torch.Generator,
    points: Float[Tensor, "V T 2"],
    radius: Float[Tensor, "V T"],
    heading: Float[Tensor, "V T"],
    children: int,
    count: int,
) -> tuple[Float[Tensor, "W U 2"], Float[Tensor, "W U"], Float[Tensor, "W U"]]:
    """Let `children` vessels of `count` points branch off each vessel, thinner and diverging."""
    parent = torch.arange(points.shape[0]).repeat_interleave(children)
    vessels = len(parent)
    at = (uniform(generator, 0.12, 0.85, vessels) * points.shape[1]).long()
    side = torch.where(uniform(generator, 0, 1, vessels) < 0.5, -1.0, 1.0)
    angle = side * uniform(generator, 0.5, 1.1, vessels)
    # A branch leaves at a wide angle and then bends back towards its parent's course.
    relax = 0.45 + 0.55 * torch.exp(-4 * torch.linspace(0, 1, count))
    course = heading[parent, at][:, None] + angle[:, None] * relax
    course = course + meander(generator, vessels, count, 0.3)
    step = (points[:, 1:] - points[:, :-1]).norm(dim=-1).mean(1)[parent]
    start_radius = radius[parent, at] * uniform(generator, 0.4, 0.75, vessels)
    taper = torch.linspace(1.0, 0.55, count)
    return (
        grow(points[parent, at], course, step * count),
        start_radius[:, None] * taper,
        course,
    )


def vessel_tree(
    generator: torch.Generator,
    hilum: tuple[float, float],
    disc_radius: float,
    temporal: float,
    calibre: float,
    tortuosity: float,
) -> tuple[Float[Tensor, "N 2 2"], Float[Tensor, "N 2"]]:
    """Grow the arteries or the veins of an eye.

    Four trunks leave the hilum upwards and downwards and turn into the temporal and nasal arcades;
    one nasal and some thin temporal vessels cross the disc sideways; all branch twice.

    Args:
        generator: Source of randomness.
        hilum: Where the central vessels enter, on the unit square.
        disc_radius: Radius of the disc.
        temporal: 1 if the temple is to the right, -1 if it is to the left.
        calibre: Radius of a trunk over the disc's.
        tortuosity: Amplitude of the vessels' meandering, in radians.

    Returns:
        The ends of all straight segments and the vessel's radii there.
    """
    # Per trunk: vertical direction (-1 is up), angle from the vertical towards the temple where the
    # vessel leaves the hilum, the same further out, relative calibre.
    thin = 3
    up = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, *[(-1.0) ** k for k in range(thin)]])
    count, points = len(up), 44
    first = torch.randn(count, generator=generator) * 0.5
    first[4:] += torch.tensor([-0.9, *[0.7] * thin])
    final = torch.tensor([0.55, -0.75, 0.55, -0.75, -1.35, *[1.45] * thin])
    final = final + torch.randn(count, generator=generator) * 0.22
    scale = torch.tensor([1.0, 0.72, 1.0, 0.72, 0.5, *[0.3] * thin])
    scale = scale * uniform(generator, 0.8, 1.2, count)

    reach = 1.7 * max(disc_radius * 2.2, 0.55)
    along = torch.linspace(0, reach, points)
    turn = 1 - torch.exp(-along / (0.55 * disc_radius))
    # The temporal arcades embrace the macula: beyond the disc they bend towards the temple.
    arcade = torch.where(final > 0, 0.16, 0.05)[:, None] * (along / disc_radius - 1).clamp(min=0)
    angle = first[:, None] * (1 - turn) + final[:, None] * turn + arcade.clamp(max=0.7)
    # Vessels wind most where they climb out of the cup, thin ones all along.
    winding = torch.where((scale < 0.4)[:, None], 1.7, 0.65 + 0.8 * torch.exp(-along / disc_radius))
    angle = angle + tortuosity * winding * meander(generator, count, points, 1.0)
    heading = torch.atan2(up[:, None] * angle.cos(), angle.sin())

    # The central vessels have divided before they surface, so trunks surface a little apart.
    scatter = torch.tensor([0.14, 0.10]) * torch.randn(count, 2, generator=generator)
    scatter[:, 1] += 0.10 * up
    curves = grow(disc_radius * scatter, heading, torch.full((count,), reach))
    # The vessels rise from the depth of the nerve: their first stretch is thin.
    rise = 0.25 + 0.75 * (along / (0.4 * disc_radius)).clamp(max=1)
    radius = calibre * disc_radius * scale[:, None] * torch.linspace(1, 0.6, points) * rise

    segments, radii = [curves], [radius]
    for children, points in ((2, 26), (2, 16)):
        curves, radius, heading = branch(generator, curves, radius, heading, children, points)
        segments.append(curves)
        radii.append(radius)
    ends = torch.cat([torch.stack([c[:, :-1], c[:, 1:]], 2).reshape(-1, 2, 2) for c in segments])
    # Grown round the origin with the temple to the right.
    ends = torch.tensor(hilum) + ends * torch.tensor([temporal, 1.0])
    return ends, torch.cat([torch.stack([r[:, :-1], r[:, 1:]], 2).reshape(-1, 2) for r in radii])


def trace_vessels(
    ends: Float[Tensor, "N 2 2"], radii: Float[Tensor, "N 2"], size: int, nearest: int = 12
) -> tuple[Float[Tensor, "S S"], Float[Tensor, "S S"]]:
    """Light's path through the blood at each pixel, and the reflex along the vessels' axes.

    Pixels are taken in tiles, and each tile looks at its `nearest` segments only.

    Returns:
        The chord 2·√(r² − d²) at distance d from the axis of a vessel of radius r, and the reflex
        in [0, 1]; where vessels overlap, the largest.
    """
    tiles = 32
    pixels = -(-size // tiles)
    # Pixel centres of `size`, continued to whole tiles: [tile, pixel, 1] for x and for y.
    x, y = (
        (axis * (pixels * tiles / size))
        .reshape(tiles, pixels, tiles, pixels)
        .transpose(1, 2)
        .reshape(tiles * tiles, pixels * pixels, 1)
        for axis in pixel_centres(pixels * tiles)
    )
    middle, half = ends.mean(1), (ends[:, 1] - ends[:, 0]).norm(dim=-1) / 2
    inside = ((middle - 0.5).abs() < 0.6).all(-1)
    ends, radii, middle, half = ends[inside], radii[inside], middle[inside], half[inside]
    tile_middle = torch.stack([x.mean((1, 2)), y.mean((1, 2))], -1)
    reach = torch.cdist(tile_middle, middle) - half - radii.amax(1)
    index = reach.topk(min(nearest, len(ends)), largest=False).indices[:, None]

    # Distance to a segment: drop the component along it, up to its ends.
    start, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    unit = along / along.square().sum(-1, keepdim=True).clamp(min=1e-12)
    offset_x, offset_y = x - start[:, 0][index], y - start[:, 1][index]
    share = (offset_x * unit[:, 0][index] + offset_y * unit[:, 1][index]).clamp_(0, 1)
    offset_x -= share * along[:, 0][index]
    offset_y -= share * along[:, 1][index]
    squared = offset_x.square_() + offset_y.square_()
    radius = torch.lerp(radii[:, 0][index], radii[:, 1][index], share)
    # A vessel narrower than a pixel is widened to one and diluted to the same amount of blood.
    wide = radius.square() + (0.6 / size) ** 2
    dilution = (radius.square_() / wide).square_()
    chord = 2 * ((wide - squared) * dilution).amax(-1).clamp(min=0).sqrt()
    # Only a vessel of some pixels shows a reflex, hence the higher power.
    reflex = (dilution * dilution * (1 - 8 * squared / wide)).amax(-1).clamp(min=0)

    def untile(value: Tensor) -> Tensor:
        value = value.reshape(tiles, tiles, pixels, pixels).transpose(1, 2)
        return value.reshape(pixels * tiles, pixels * tiles)[:size, :size]

    return untile(chord), untile(reflex)


def gaussian_blur(image: Float[Tensor, "C S S"], deviation: float) -> Float[Tensor, "C S S"]:
    """Blur by a Gaussian of `deviation` pixels; edges are mirrored."""
    reach = min(max(1, math.ceil(3 * deviation)), image.shape[-1] - 1)
    offset = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offset / max(deviation, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    padded = F.pad(image[:, None], [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[:, :, None]), kernel[..., None])[:, 0]


def colour(value: Colour | Tensor) -> Float[Tensor, "3 1 1"]:
    """A colour as a factor for images."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(3, 1, 1)


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


def fundus(
    centre: Centre, generator: torch.Generator, size: int
) -> tuple[Float[Tensor, "3 S S"], Float[Tensor, "2 S S"]]:
    """Draw one eye of a centre's patients and photograph it.

    Args:
        centre: Whose patients, and whose camera.
        generator: Source of randomness; what is drawn does not depend on `size`.
        size: Side of the square image in pixels.

    Returns:
        The image, stretched to [0, 1], and the masks [disc with cup, cup].
    """
    x, y = pixel_centres(size)
    temporal = 1.0 if float(uniform(generator, 0, 1)) < 0.5 else -1.0
    radius = normal(generator, *centre.disc_radius)
    margin = 0.5 - radius * 1.12
    middle = [
        0.5 + max(-margin, min(margin, normal(generator, 0, centre.jitter))) for _ in range(2)
    ]

    # Disc coordinates: rho is 1 on the outline, theta 0 towards the temple, u and v Cartesian.
    theta = torch.atan2(y - middle[1], temporal * (x - middle[0]))
    outline = wavy_circle(generator, theta, 0.022) - 0.045 * torch.cos(2 * theta)
    rho = torch.hypot(x - middle[0], y - middle[1]) / (radius * outline)
    u, v = rho * theta.cos(), rho * theta.sin()
    ratio = max(0.2, min(0.88, normal(generator, *centre.cup_to_disc)))
    cup_u = (1 - ratio) * float(uniform(generator, -0.05, 0.35))
    cup_v = (1 - ratio) * float(uniform(generator, -0.15, 0.2))
    cup_angle = torch.atan2(v - cup_v, u - cup_u)
    cup_rho = torch.hypot(u - cup_u, v - cup_v) / (ratio * wavy_circle(generator, cup_angle, 0.05))
    cup_rho = torch.maximum(cup_rho, rho / 0.95)  # a thin rim remains everywhere
    target = torch.stack([rho <= 1, cup_rho <= 1]).float()

    tint = eye_tint(centre, generator)
    reflectance = background(centre, generator, tint, x, y, rho, theta)
    reflectance = draw_disc(
        reflectance, centre, generator, tint, x, y, (rho, theta, cup_rho), ratio
    )

    # The central vessels enter at the nasal side of the cup.
    hilum = (
        middle[0] + temporal * radius * (cup_u - 0.35 * ratio - float(uniform(generator, 0, 0.12))),
        middle[1] + radius * float(uniform(generator, -0.12, 0.12)),
    )
    tortuosity = float(uniform(generator, 0.25, 0.55))
    # Absorption per disc radius of blood in red, green, blue: venous blood is darker.
    for calibre, absorption, shine in (
        (0.072, (2.3, 7.0, 6.4), 0.06),
        (0.055, (1.1, 5.8, 5.4), 0.25),
    ):
        calibre = calibre * float(uniform(generator, 0.85, 1.2))
        ends, radii = vessel_tree(generator, hilum, radius, temporal, calibre, tortuosity)
        chord, reflex = trace_vessels(ends, radii, size)
        reflectance = reflectance * torch.exp(-colour(absorption) * chord / radius)
        reflectance = reflectance * (1 + shine * reflex)
    return normalise(photograph(reflectance, centre, generator, temporal)), target


def eye_tint(centre: Centre, generator: torch.Generator) -> Float[Tensor, "3 1 1"]:
    """How an eye's colour differs from its centre's mean: darker or lighter, redder or paler."""
    light, pale = centre.pigment_spread * torch.randn(2, generator=generator).clamp(-1.5, 1.5)
    return torch.exp(0.7 * light + pale * colour((-0.3, 0.55, 0.8)))


def background(
    centre: Centre,
    generator: torch.Generator,
    tint: Float[Tensor, "3 1 1"],
    x: Float[Tensor, "S S"],
    y: Float[Tensor, "S S"],
    rho: Float[Tensor, "S S"],
    theta: Float[Tensor, "S S"],
) -> Float[Tensor, "3 S S"]:
    """Reflectance of the retina and choroid round the disc."""
    clouds = fractal_noise(generator, x, y, (3, 6, 12))
    # The choroid's vessels: ridges of a warped field make a network of orange strands.
    warp_x = fractal_noise(generator, x, y, (5, 10))
    warp_y = fractal_noise(generator, x, y, (5, 10))
    strands = fractal_noise(generator, x + 0.03 * warp_x, y + 0.03 * warp_y, (9, 18))
    strands = torch.exp(-((strands / 0.45) ** 2)) - 0.45
    visible = centre.tessellation * float(uniform(generator, 0, 1.6)) * torch.sigmoid(clouds)
    grain = fractal_noise(generator, x, y, (32, 64, 128), persistence=0.9)
    # Nerve fibres: fine streaks leaving the disc, dense at its upper and lower pole.
    fibres = torch.randn(3, 90, generator=generator)
    streaks = lattice_noise(fibres, theta / (2 * math.pi) + 0.5, rho / 6)
    streaks = streaks * theta.sin().square() * torch.exp(-((rho - 1).clamp(min=0)))
    shade = 1 + 0.09 * clouds + 0.022 * grain + 0.035 * streaks
    image = colour(centre.pigment) * tint * shade
    return image * (1 + colour((0.22, 0.42, 0.25)) * visible * strands).clamp(min=0.2)


def draw_disc(
    image: Float[Tensor, "3 S S"],
    centre: Centre,
    generator: torch.Generator,
    tint: Float[Tensor, "3 1 1"],
    x: Float[Tensor, "S S"],
    y: Float[Tensor, "S S"],
    coordinates: tuple[Float[Tensor, "S S"], Float[Tensor, "S S"], Float[Tensor, "S S"]],
    ratio: float,
) -> Float[Tensor, "3 S S"]:
    """Lay atrophy, neuroretinal rim and cup over the background's reflectance."""
    rho, theta, cup_rho = coordinates
    rough = fractal_noise(generator, x, y, (8, 16, 32))
    if_atrophy, width, direction = uniform(generator, 0, 1, 3)
    if float(if_atrophy) < centre.atrophy:
        # Beta zone: pale sclera through a thinned choroid; alpha zone: clumped pigment beyond it.
        facing = torch.cos(theta - (direction - 0.5) * 2.0).clamp(min=0) ** 1.5
        beta = 1 + (0.08 + 0.3 * width) * facing + 0.02 * rough
        alpha = beta + (0.05 + 0.1 * width) * facing
        pigment = torch.sigmoid((alpha - rho) / 0.05) * facing * (0.25 + 0.2 * rough).clamp(0, 0.6)
        image = image * (1 - pigment)
        pale = 0.55 * colour(centre.rim) * colour((1.0, 1.2, 1.15)) + 0.45 * image
        pale = pale * (1 + 0.1 * rough)
        image = torch.lerp(image, pale, 0.85 * torch.sigmoid((beta - rho) / 0.025) * facing.sqrt())

    tint = tint.sqrt() * eye_tint(centre, generator).sqrt()
    # The rim is pinker and thicker in fibres on the nasal side, paler towards the temple.
    side = theta.cos() * rho.clamp(max=1)
    rim = colour(centre.rim) * tint * (1 + colour((0.04, 0.13, 0.16)) * side)
    rim = rim * (1 + 0.03 * rough)
    cup = colour(centre.cup) * tint * (1 + 0.03 * rough)
    softness = float(uniform(generator, 0.03, 0.13)) * (1 + 0.5 * side)
    depth = torch.sigmoid((1 - cup_rho) * ratio / softness)
    contrast = float(uniform(generator, 0.55, 1.1))
    pallor = contrast * depth * (0.72 + 0.28 * (1 - cup_rho.square()).clamp(min=0) + 0.1 * side)
    disc = torch.lerp(rim, cup, pallor.clamp(0, 1))
    # The outline is crisp towards the temple and veiled by nerve fibres towards the nose.
    edge = float(uniform(generator, 0.018, 0.04)) * (1.7 - 0.9 * theta.cos())
    disc = disc * (1 + 0.10 * torch.exp(-(((rho - 0.97) / 0.05) ** 2)) * theta.cos().clamp(min=0))
    return torch.lerp(image, disc, torch.sigmoid((1 - rho) / edge))


class SyntheticFundus(Dataset[Sample]):
    """Synthetic photographs of one centre, drawn when asked for.

    An eye depends on the seed, the centre and its number alone: not on the order of access, the
    size or the length. The training and the test split are disjoint; "all" is a training half
    and then a test half, the same eyes as two splits of these lengths hold.

    Args:
        centre: A name from `CENTRES`.
        length: Number of photographs.
        size: Side of the square images in pixels.
        seed: Seed of the whole data set.
        split: "train", "test" or "all".
        cache: Keep drawn photographs in memory (about 20 bytes a pixel).

    Raises:
        ValueError: If the centre or split is unknown, or length or size is not positive.
    """

    def __init__(
        self,
        centre: str,
        length: int,
        size: int = 128,
        seed: int = 0,
        split: Split = "all",
        cache: bool = True,
    ) -> None:
        if centre not in CENTRES:
            raise ValueError(f"no synthetic centre {centre!r}; choose from {', '.join(CENTRES)}")
        if split not in ("all", "train", "test"):
            raise ValueError(f"split is 'all', 'train' or 'test', not {split!r}")
        if length < 1 or size < 16:
            raise ValueError(
                f"length must be at least 1 and size at least 16, not {length} and {size}"
            )
        self.centre, self.length, self.size, self.seed = centre, length, size, seed
        self.split, self.cache = split, cache
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.length

    def eye(self, index: int) -> int:
        """Number of the eye at `index`: even ones are for training, odd ones for testing."""
        training = {"train": self.length, "test": 0, "all": (self.length + 1) // 2}[self.split]
        return 2 * index if index < training else 2 * (index - training) + 1

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is outside {self.length} photographs")
        eye = self.eye(index % self.length)
        if eye in self._drawn:
            sample = self._drawn[eye]
        else:
            # The step is odd, so the eyes of one domain have different seeds for certain.
            start = zlib.crc32(f"{self.centre}/{self.seed}".encode())
            generator = torch.Generator().manual_seed((start + 0x9E3779B1 * eye) % 2**32)
            image, target = fundus(CENTRES[self.centre], generator, self.size)
            sample = Sample(f"{self.centre}/image/{eye:04d}.png", image, target)
            if self.cache:
                self._drawn[eye] = sample
        # Copies: what a caller does to its image is not seen by the next one.
        return Sample(sample.name, sample.image.clone(), sample.target.clone())
