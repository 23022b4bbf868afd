"""Vessels of a synthetic eye: growing arteries and veins, and tracing light through them.

They are cylinders of absorbing blood (Beer-Lambert's law), which makes thin ones faint and
crossings dark without further rules.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from examples.common.drawing import pixel_centres, uniform


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
