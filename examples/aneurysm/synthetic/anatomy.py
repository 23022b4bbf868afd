"""Vessel trees with saccular aneurysms, in mm.

An artery winds upwards and divides; its branches divide again and again, and grow thinner by
Murray's law (Murray 1926, https://doi.org/10.1073/pnas.12.3.207): the cubes of the daughters' radii
add up to the cube of the mother's. Aneurysms sit where wide vessels divide, or on their walls.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from examples.aneurysm.synthetic.centres import Centre

STEP = 1.0  # length of a straight piece of vessel, mm
THINNEST = 0.3  # radius below which a vessel is not followed, mm
GENERATIONS = 5
TILE = 4.0  # side of the blocks that the volume is drawn in, mm
NEAREST = 32  # pieces of vessel that a block looks at


@dataclass
class Sac:
    """An aneurysm: an ellipsoid with bumps, cut off by the vessel that it sits on.

    Attributes:
        centre: Position, mm.
        semiaxes: Along x, y and z, mm.
        bumps: Directions [3, 3] and phases [3] of the waves on its surface.
    """

    centre: Float[Tensor, " 3"]
    semiaxes: Float[Tensor, " 3"]
    bumps: tuple[Float[Tensor, "3 3"], Float[Tensor, " 3"]]

    def depth(self, points: Float[Tensor, "... 3"]) -> Float[Tensor, "..."]:
        """How deep points are inside, mm: positive inside, 0 on the surface, negative outside."""
        offset = (points - self.centre) / self.semiaxes
        distance = offset.norm(dim=-1)
        directions, phases = self.bumps
        waves = torch.sin(F.normalize(offset, dim=-1) @ directions.T * 2.5 + phases).sum(-1)
        return (1 + 0.05 * waves - distance) * self.semiaxes.mean()


@dataclass
class Anatomy:
    """The vessels and aneurysms of a patient; the origin is the middle of the volume.

    Attributes:
        ends: Of straight pieces of vessel, mm.
        radii: At these ends, mm.
        sacs: The aneurysms.
        forks: Radii of mother, first and second daughter where vessels divide, mm.
    """

    ends: Float[Tensor, "N 2 3"]
    radii: Float[Tensor, "N 2"]
    sacs: list[Sac]
    forks: list[tuple[float, float, float]]

    def depth(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """How deep points are inside the vessels, mm, by all pieces of vessel; for few points."""
        return _depth(points[None], self.ends[None], self.radii[None])[0]

    def rasterise(
        self, size: int, field_of_view: float
    ) -> tuple[Float[Tensor, "S S S"], Float[Tensor, "S S S"]]:
        """Depth in vessels and in aneurysms at the voxels of a cube, mm.

        Args:
            size: Side of the cube, voxels.
            field_of_view: Side of the cube, mm.

        Returns:
            Both are positive inside and correct near the surface; far away from all vessels the
            depth is only known to be negative.
        """
        side = max(1, round(TILE * size / field_of_view))
        tiles = -(-size // side)
        ticks = (torch.arange(tiles * side) + 0.5) * field_of_view / size - field_of_view / 2
        grid = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1)
        blocks = grid.reshape(tiles, side, tiles, side, tiles, side, 3)
        points = blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(tiles**3, side**3, 3)
        half = (self.ends[:, 1] - self.ends[:, 0]).norm(dim=-1) / 2
        reach = torch.cdist(points.mean(1), self.ends.mean(1)) - half - self.radii.amax(1)
        nearest = reach.topk(min(NEAREST, len(half)), largest=False).indices
        depth = torch.cat(
            [
                _depth(chunk, self.ends[index], self.radii[index])
                for chunk, index in zip(points.split(128), nearest.split(128), strict=True)
            ]
        )
        vessels = depth.reshape(tiles, tiles, tiles, side, side, side).permute(0, 3, 1, 4, 2, 5)
        vessels = vessels.reshape(grid.shape[:3])[:size, :size, :size]
        voxels = grid[:size, :size, :size]
        sacs = torch.stack([sac.depth(voxels) for sac in self.sacs]).amax(0)
        return vessels.contiguous(), sacs


@dataclass
class _Growth:
    """A tree while it grows."""

    generator: torch.Generator
    tortuosity: float
    limit: float  # half the field of view, mm
    points: list[Tensor] = field(default_factory=list)
    radii: list[Tensor] = field(default_factory=list)
    forks: list[tuple[float, float, float]] = field(default_factory=list)
    sites: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # where, outwards, r

    def vessel(
        self,
        start: Tensor,
        heading: Tensor,
        radius: float,
        length: float,
        winding: float = 1.0,
        end_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Lets a vessel grow, and returns its points and headings; it ends outside the volume."""
        count = max(3, round(length / STEP))
        noise = torch.randn(1, 3, count + 8, generator=self.generator)
        smooth = F.avg_pool1d(noise, 9, stride=1)[0].T
        turns = (0.55 * winding * self.tortuosity * smooth).cumsum(0)
        headings = F.normalize(heading + turns, dim=-1)
        points = torch.cat([start[None], start + (STEP * headings).cumsum(0)])
        if end_at is not None:
            points = points + torch.linspace(0, 1, len(points))[:, None] * (end_at - points[-1])
            headings = F.normalize(points[1:] - points[:-1], dim=-1)
        outside = (points.abs() > self.limit + 2).any(-1).nonzero()
        end = int(outside[0]) + 1 if len(outside) else len(points)
        points, headings = points[: max(end, 2)], headings[: max(end, 2) - 1]
        self.points.append(points)
        self.radii.append(radius * torch.linspace(1, 0.92, len(points)))
        return points, headings

    def divide(self, point: Tensor, heading: Tensor, radius: float, generation: int) -> None:
        """Lets a vessel divide in two, and both daughters grow and divide."""
        if radius < THINNEST or generation > GENERATIONS or (point.abs() > self.limit).any():
            return
        share = _uniform(self.generator, 0.35, 0.65)
        first, second = radius * share ** (1 / 3), radius * (1 - share) ** (1 / 3)
        self.forks.append((radius, first, second))
        if generation <= 1:
            self.sites.append((point, heading, radius))
        across = _across(heading, self.generator)
        for daughter, side in ((first, 1.0), (second, -1.0)):
            angle = side * _uniform(self.generator, 0.5, 1.0)
            towards = heading * math.cos(angle) + across * math.sin(angle)
            # Vessels that come near the border turn inwards.
            towards = F.normalize(towards - 0.8 * (point / self.limit) ** 3, dim=-1)
            length = (5 + 5 * daughter) * _uniform(self.generator, 0.8, 1.5)
            points, headings = self.vessel(point, towards, daughter, length)
            if generation <= 1:
                middle = len(headings) // 2
                outwards = _across(headings[middle], self.generator)
                self.sites.append((points[middle], outwards, daughter))
            self.divide(points[-1], headings[-1], 0.92 * daughter, generation + 1)


def grow(centre: Centre, generator: torch.Generator) -> Anatomy:
    """Draws a patient of a centre.

    Args:
        centre: Whose patient.
        generator: Source of randomness.
    """
    half = centre.field_of_view / 2
    tree = _Growth(generator, centre.tortuosity, half)
    radius = _normal(generator, *centre.calibre)
    start = torch.tensor([-half - 1.0, *(_uniform(generator, -5, 5) for _ in range(2))])
    upwards = torch.tensor([1.0, 0.0, 0.0])
    # The artery winds, but divides near the middle.
    middle = 0.25 * half * (2 * torch.rand(3, generator=generator) - 1) - 0.2 * half * upwards
    points, headings = tree.vessel(start, upwards, radius, 1.1 * half, 1.6, middle)
    heading = F.normalize(headings[-1] + upwards, dim=-1)
    tree.divide(points[-1], heading, 0.92 * radius, 0)
    wall = len(headings) // 2
    tree.sites.append((points[wall], _across(headings[wall], generator), radius))

    inside = [site for site in tree.sites if (site[0].abs() < 0.75 * half).all()] or tree.sites[:1]
    order = torch.randperm(len(inside), generator=generator).tolist()
    count = 1 + (_uniform(generator, 0, 1) < centre.second_sac)
    sacs = [_sac(centre, generator, *inside[site]) for site in order[:count]]
    ends = torch.cat([torch.stack([p[:-1], p[1:]], dim=1) for p in tree.points])
    radii = torch.cat([torch.stack([r[:-1], r[1:]], dim=1) for r in tree.radii])
    return Anatomy(ends, radii, sacs, tree.forks)


def label(vessels: Float[Tensor, "S S S"], sacs: Float[Tensor, "S S S"]) -> Bool[Tensor, "2 S S S"]:
    """Vessel and aneurysm, from the depth in both: what a vessel and a sac share is vessel."""
    vessel = vessels > 0
    return torch.stack([vessel, (sacs > 0) & ~vessel])


def _sac(
    centre: Centre, generator: torch.Generator, point: Tensor, outwards: Tensor, vessel: float
) -> Sac:
    median, spread = centre.sac
    radius = median * math.exp(_normal(generator, 0.0, spread))
    semiaxes = radius * torch.tensor([_uniform(generator, 0.85, 1.18) for _ in range(3)])
    bumps = F.normalize(torch.randn(3, 3, generator=generator), dim=-1)
    phases = 2 * math.pi * torch.rand(3, generator=generator)
    # Its neck is where it dips into the vessel, by about a quarter of its radius.
    return Sac(point + outwards * (vessel + 0.75 * radius), semiaxes, (bumps, phases))


def _depth(
    points: Float[Tensor, "T P 3"], ends: Float[Tensor, "T N 2 3"], radii: Float[Tensor, "T N 2"]
) -> Float[Tensor, "T P"]:
    """The largest of radius minus distance to the axis, over pieces of vessel."""
    start, along = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    squared = along.square().sum(-1).clamp(min=1e-12)
    # |p − s − t·a|² with t = (p − s)·a/a², clamped, without a [T, P, N, 3] tensor.
    share = (points @ along.mT - (start * along).sum(-1)[:, None]) / squared[:, None]
    share = share.clamp(0, 1)
    offset = points.square().sum(-1)[..., None] - 2 * points @ start.mT
    offset = offset + start.square().sum(-1)[:, None]
    towards = points @ along.mT - (start * along).sum(-1)[:, None]
    distance = (offset - 2 * share * towards + share.square() * squared[:, None]).clamp(min=0)
    radius = torch.lerp(radii[:, None, :, 0], radii[:, None, :, 1], share)
    return (radius - distance.sqrt()).amax(-1)


def _across(heading: Float[Tensor, " 3"], generator: torch.Generator) -> Float[Tensor, " 3"]:
    """A random direction at right angles to a heading."""
    draw = torch.randn(3, generator=generator)
    return F.normalize(draw - (draw @ heading) * heading, dim=-1)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _normal(generator: torch.Generator, mean: float, deviation: float) -> float:
    """A normal number, cut off at two deviations."""
    draw = float(torch.randn((), generator=generator))
    return mean + deviation * max(-2.0, min(2.0, draw))
