"""The synthetic centres: whom each of them photographs, and with which camera."""

from dataclasses import dataclass, fields
from typing import Any

from examples.common.drawing import Colour


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

NO_APERTURE = 0.75
"""A radius at which an aperture does not show, beyond the image's corners at 0.707."""


def centre_at(name: str, strength: float) -> Centre:
    """A centre whose difference from the mean over all centres is multiplied by `strength`.

    At 1 it is the centre itself, at 0 all centres are the same. An aperture that does not show
    counts as one of radius `NO_APERTURE`.

    Args:
        name: From `CENTRES`.
        strength: In [0, 1]; beyond, statistics need not be possible ones.

    Raises:
        ValueError: The strength is outside [0, 1], or there is no such centre.

    Example:
        >>> [round(centre_at("centre_d", strength).noise, 4) for strength in (0, 0.5, 1)]
        [0.0164, 0.0222, 0.028]
    """
    if name not in CENTRES:
        raise ValueError(f"no synthetic centre {name!r}; choose from {', '.join(CENTRES)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of the shift is {strength}; choose one from 0 to 1")
    if strength == 1:
        return CENTRES[name]
    values: dict[str, Any] = {}
    for field in fields(Centre):
        own, *others = (
            getattr(centre, field.name) for centre in (CENTRES[name], *CENTRES.values())
        )
        if field.name == "field_of_view":
            radii = (NO_APERTURE if each is None else each for each in (own, *others))
            radius = _blend(*radii, strength=strength)
            values[field.name] = radius if radius < 2**-0.5 else None
        elif isinstance(own, tuple):
            parts = zip(own, *others, strict=True)
            values[field.name] = tuple(_blend(*part, strength=strength) for part in parts)
        else:
            values[field.name] = _blend(own, *others, strength=strength)
    return Centre(**values)


def _blend(own: float, *others: float, strength: float) -> float:
    mean = sum(others) / len(others)
    return mean + strength * (own - mean)
