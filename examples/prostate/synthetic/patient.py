"""A synthetic patient: what the slices of one examination have in common."""

import math
from dataclasses import dataclass

import torch

from examples.common.drawing import normal, uniform
from examples.prostate.synthetic.sites import Site

Nodule = tuple[float, float, float, float, float]
"""Middle x, y, z and radius in a gland of radius 1, and signal."""


@dataclass(frozen=True)
class Patient:
    """The anatomy of one patient. Lengths are in mm; x is to the right, y down, that is posterior.

    Attributes:
        middle: Of the gland, from the image's.
        axes: Half-axes of the gland to the right and down.
        coil: Whether an endorectal coil lies in the rectum.
        transition: Radius of the transition zone where the gland's is 1.
        nodules: Of the transition zone.
        lesion: A dark focus in the peripheral zone, as a nodule is described, or None.
        bladder: Radius of the bladder above the gland.
        rectum: Radius of the rectum.
        stool: Signal of what is in it; air has none.
        muscle: Thickness of the internal obturator muscles, relative to the mean.
        tilt: Of the pelvis, radians.
    """

    middle: tuple[float, float]
    axes: tuple[float, float]
    coil: bool
    transition: float
    nodules: tuple[Nodule, ...]
    lesion: Nodule | None
    bladder: float
    rectum: float
    stool: float
    muscle: float
    tilt: float


def draw_patient(site: Site, generator: torch.Generator) -> Patient:
    """Draws a patient of a site."""

    def between(low: float, high: float) -> float:
        return float(uniform(generator, low, high))

    middle = normal(generator, 0, site.offset), normal(generator, -2, site.offset)
    coil = between(0, 1) < site.endorectal
    width = normal(generator, *site.size)
    depth = width * between(0.62, 0.85) * (0.85 if coil else 1.0)
    # A large gland is large for its transition zone.
    transition = min(0.85, max(0.55, 0.52 + 0.02 * (width - 18) + normal(generator, 0, 0.06)))
    nodules = []
    for _ in range(12):  # as many draws for everyone
        radius, angle, height = between(0, 0.75), between(0, 2 * math.pi), between(-0.7, 0.9)
        place = radius * math.cos(angle), radius * math.sin(angle), height
        nodules.append((*place, between(0.12, 0.34), between(0.22, 0.72)))
    side, angle, size = between(-1, 1), between(0.15, 0.9), between(0.12, 0.26)
    lesion = (
        math.copysign(0.84 * math.cos(angle), side), 0.84 * math.sin(angle),
        between(-0.5, 0.5), size, 0.28,
    )  # fmt: skip
    return Patient(
        middle, (width, depth), coil, transition, tuple(nodules),
        lesion if between(0, 1) < 0.4 else None,
        bladder=between(18, 38), rectum=between(19, 24) if coil else between(9, 17),
        stool=0.0 if coil or between(0, 1) < 0.55 else between(0.25, 0.5),
        muscle=between(0.8, 1.25), tilt=normal(generator, 0, 0.04),
    )  # fmt: skip
