"""What is in a slice of a synthetic patient: T2 signal, where fluid has 1, and the gland's mask.

Organs are painted from back to front on a plane in mm, with soft edges, so that nothing depends on
the number of pixels.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from examples.common.drawing import fractal_noise, pixel_centres, uniform, wavy_circle
from examples.prostate.synthetic.patient import Nodule, Patient
from examples.prostate.synthetic.sites import Site

MUSCLE, CORTEX, MARROW, WALL = 0.17, 0.04, 0.65, 0.22
"""Signals that all sites share; that of marrow relative to fat."""
BENT = 1.6  # mm, the deviation by which shapes are distorted


class Canvas:
    """The slice while it is painted.

    Args:
        field_of_view: Side, mm.
        tilt: Of the anatomy, radians.
        generator: Of textures.
        size: Side, pixels.
    """

    def __init__(
        self, field_of_view: float, tilt: float, generator: torch.Generator, size: int
    ) -> None:
        self.u, self.v = pixel_centres(size)  # on the unit square, where textures are defined
        x, y = (self.u - 0.5) * field_of_view, (self.v - 0.5) * field_of_view
        self.generator = generator
        # Organs are no ellipses: the plane is bent a little, mask and signal alike.
        x, y = (side + BENT * self.noise(5, 9) for side in (x, y))
        self.x = math.cos(tilt) * x - math.sin(tilt) * y
        self.y = math.sin(tilt) * x + math.cos(tilt) * y
        self.signal = torch.zeros_like(x)

    def ellipse(
        self, middle: tuple[float, float], axes: tuple[float, float], turn: float = 0.0
    ) -> Float[Tensor, "S S"]:
        """Signed distance from an ellipse's outline, about in mm: negative inside."""
        x, y = self.x - middle[0], self.y - middle[1]
        along = math.cos(turn) * x + math.sin(turn) * y
        across = math.cos(turn) * y - math.sin(turn) * x
        return (torch.hypot(along / axes[0], across / axes[1]) - 1) * min(axes)

    def noise(self, *cells: int) -> Float[Tensor, "S S"]:
        """A texture of about unit variance; see `fractal_noise`."""
        return fractal_noise(self.generator, self.u, self.v, cells)

    def paint(
        self, distance: Float[Tensor, "S S"], signal: float | Tensor, edge: float = 0.5
    ) -> None:
        """Paints where a distance is negative, with an edge of about this width, mm."""
        share = torch.sigmoid(-2 * distance / edge)
        self.signal = self.signal * (1 - share) + share * signal


def draw_slice(
    patient: Patient, site: Site, height: float, generator: torch.Generator, size: int
) -> tuple[Float[Tensor, "S S"], Float[Tensor, "S S"]]:
    """Draws one slice.

    Args:
        patient: Whose anatomy.
        site: For the field of view, the contrast of the zones and the signal of fat.
        height: Of the slice in the gland, from −1 at the apex to 1 at the base.
        generator: Of textures and of the outline.
        size: Side, pixels.

    Returns:
        The signal, and the mask of the prostate: 1 inside.
    """
    canvas = Canvas(site.field_of_view, patient.tilt, generator, size)
    _surroundings(canvas, patient, site, height)
    x0, y0 = patient.middle
    # Narrow at the apex, blunt at the base.
    extent = (1 - abs(height) ** (2.0 if height < 0 else 3.5)) ** 0.5
    a, b = (axis * max(0.3, extent) for axis in patient.axes)
    _rectum(canvas, patient, (x0, y0 + b), height)
    _bladder(canvas, patient, site, (x0, y0 - b), height)
    mask = _gland(canvas, patient, site, (x0, y0), (a, b), height)
    return canvas.signal.clamp(min=0), mask


def _surroundings(canvas: Canvas, patient: Patient, site: Site, height: float) -> None:
    """Fat, muscles and bones of the pelvis, symmetric but for the tilt."""
    fat = site.fat * (1 + 0.07 * canvas.noise(6, 14, 40))
    canvas.paint(canvas.ellipse((0, 10), (185, 105)), fat, 2.0)  # the body in the air
    streaks = canvas.noise(10, 30, 60)
    muscle = MUSCLE * (1 + 0.22 * streaks) + 0.10 * site.fat * (streaks - 0.9).clamp(min=0)
    thick = patient.muscle
    for side in (-1.0, 1.0):
        # Gluteus maximus, adductors, obturator internus and levator ani.
        canvas.paint(canvas.ellipse((side * 78, 82), (62, 30), side * 0.55), muscle)
        canvas.paint(canvas.ellipse((side * 66, -52), (40, 15 * thick), side * 0.45), muscle)
        if height > -0.3:
            head = canvas.ellipse((side * 88, -6), (27, 29))
            canvas.paint(head, CORTEX)
            canvas.paint(head + 3, MARROW * fat * (1 + 0.08 * streaks))
        else:
            ischium = canvas.ellipse((side * 72, 20), (13, 25), side * 0.2)
            canvas.paint(ischium, CORTEX)
            canvas.paint(ischium + 2.5, MARROW * fat * (1 + 0.08 * streaks))
        wall = canvas.ellipse((side * 51, 2), (8 * thick, 42), side * 0.16)
        canvas.paint(wall, muscle)
        if height < 0.55:
            pubis = canvas.ellipse((side * 20, -52), (19, 10), -side * 0.35)
            canvas.paint(pubis, CORTEX)
            canvas.paint(pubis + 2, MARROW * fat * (1 + 0.1 * streaks))
    if height < 0.55:
        canvas.paint(canvas.ellipse((0, -52), (3, 9)), 0.3)  # the symphysis
    # Vessels and septa in the fat that the pelvic floor encloses.
    x0, y0 = patient.middle
    inside = canvas.ellipse((x0, y0 + 14), (patient.axes[0] + 12, patient.axes[1] + 34))
    vessels = canvas.noise(22, 44, 88)
    dark, bright = (vessels - 1.0).clamp(0, 1), (-1.1 - vessels).clamp(0, 1)
    canvas.paint(inside, fat * (0.9 - 0.6 * dark) + 0.3 * bright, 1.0)
    canvas.paint(inside.abs() - 1.5, MUSCLE * 1.1)


def _rectum(canvas: Canvas, patient: Patient, front: tuple[float, float], height: float) -> None:
    """Behind the gland: a canal at the apex, wider above; or the balloon of a coil."""
    narrow = 0.55 if height < -0.5 and not patient.coil else 1.0
    radius = patient.rectum * narrow
    middle = front[0] + 0.15 * radius * math.sin(3 * height), front[1] + radius + 1.5
    angle = torch.atan2(canvas.y - middle[1], canvas.x - middle[0])
    outline = wavy_circle(canvas.generator, angle, 0.02 if patient.coil else 0.07)
    distance = canvas.ellipse(middle, (radius * 1.12, radius))
    distance = distance + radius * (1 - outline)
    canvas.paint(distance, WALL * (1 + 0.2 * canvas.noise(20, 40)))
    thickness = 1.5 if patient.coil else 3.0
    content = patient.stool * (1 + 0.3 * canvas.noise(12, 30)) + 0.02
    canvas.paint(distance + thickness, content)
    if narrow < 1:
        canvas.paint(distance + 0.55 * radius, 0.5)  # mucosa of the anal canal


def _bladder(
    canvas: Canvas, patient: Patient, site: Site, top: tuple[float, float], height: float
) -> None:
    """In front of the base; it is not reached at the apex."""
    share = min(1.0, max(0.0, (height - 0.1) / 0.8))
    radius = patient.bladder * share**0.5
    lift = float(uniform(canvas.generator, 0.55, 0.8))
    if radius < 4:
        return
    distance = canvas.ellipse((top[0], top[1] - lift * radius), (1.35 * radius, radius))
    canvas.paint(distance, WALL * (1 + 0.15 * canvas.noise(20, 40)))
    canvas.paint(distance + 3.5, 1.0, 0.8)


def _gland(
    canvas: Canvas,
    patient: Patient,
    site: Site,
    middle: tuple[float, float],
    axes: tuple[float, float],
    height: float,
) -> Float[Tensor, "S S"]:
    """Zones, nodules and capsule; returns the mask."""
    x, y = (canvas.x - middle[0]) / axes[0], (canvas.y - middle[1]) / axes[1]
    angle = torch.atan2(y, x)
    outline = wavy_circle(canvas.generator, angle, 0.035)
    # The back is flat, or hollow over a coil; the front is a little pointed.
    hollow = 0.16 if patient.coil else 0.08
    outline = outline - hollow * angle.sin().clamp(min=0) ** 8
    radius = torch.hypot(x, y) / outline
    scale = min(axes)
    distance = (radius - 1) * scale

    fine = canvas.noise(30, 60, 120)
    coarse = canvas.noise(16, 32)
    inner = 0.36 + 0.03 * fine + 0.05 * coarse
    outer = 0.36 + 0.36 * site.zones
    if height > 0.7:
        outer = inner + 0.12  # the central zone takes the place of the peripheral one
    canvas.paint(distance, outer + 0.05 * fine + 0.05 * coarse)
    canvas.paint(distance.abs() - 0.4, 0.2)  # the capsule

    # The transition zone grows from apex to base and lies in front.
    share = patient.transition * min(1.0, max(0.25, 0.75 + 0.5 * height))
    zone = torch.hypot(x / (1.1 * share), (y + 0.8 * (1 - share)) / share)
    zone = (torch.maximum(zone / outline, radius / 0.95) - 1) * scale
    canvas.paint(zone, inner)
    reach = torch.sigmoid(-2 * zone)
    for nodule in patient.nodules:
        _nodule(canvas, nodule, (x / share, (y + 0.8 * (1 - share)) / share), height, fine, reach)
    canvas.paint(zone.abs() - 0.35, 0.22)  # the surgical capsule

    # Muscle fibres in front, and the urethra.
    front = ((x / 0.35) ** 2 + ((y + 0.95) / 0.3) ** 2).sqrt() - 1
    canvas.paint(torch.maximum(front * scale, distance), 0.2, 1.0)
    canvas.paint((torch.hypot(x, y - 0.05) - 0.1) * scale, 0.7 if height < 0.4 else 0.45)
    if patient.lesion is not None:
        _nodule(canvas, patient.lesion, (x, y), height, fine, torch.sigmoid(-2 * distance), 0.0)
    return (radius <= 1).float()


def _nodule(
    canvas: Canvas,
    nodule: Nodule,
    place: tuple[Tensor, Tensor],
    height: float,
    texture: Float[Tensor, "S S"],
    reach: Float[Tensor, "S S"],
    rim: float = 0.10,
) -> None:
    """A ball, cut at this height; within `reach` only, with a rim that is darker by `rim`."""
    x, y, z, size, signal = nodule
    cut = size**2 - (z - height) ** 2
    if cut <= 0:
        return
    distance = (torch.hypot(place[0] - x, place[1] - y) - cut**0.5) / size
    inside = torch.sigmoid(-12 * distance) * reach
    ring = rim * torch.exp(-((distance / 0.15) ** 2)) * reach
    value = signal + 0.05 * texture
    canvas.signal = canvas.signal * (1 - inside) + inside * value - ring * canvas.signal
