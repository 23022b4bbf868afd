"""The synthetic centres: whom each of them images, and with which angiograph."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Centre:
    """The statistics of one centre: its patients, then its angiograph.

    Lengths are in mm; a pair is a mean and a standard deviation, cut off at two deviations.
    Intensities are in units of the contrast between a wide vessel and soft tissue.

    Attributes:
        field_of_view: Side of the cubic volume.
        calibre: Radius of the artery that divides.
        sac: Radius of an aneurysm: median and the standard deviation of its natural logarithm.
        second_sac: Probability of a second aneurysm.
        tortuosity: How strongly vessels wind, about 0.5 to 1.5.
        blur: Standard deviation of the Gaussian point spread.
        slice_thickness: Extent over which slices are averaged; 0 for isotropic resolution.
        noise: Standard deviation of the noise.
        grain: Standard deviation of the Gaussian by which the noise is correlated.
        texture: Standard deviation of soft tissue.
        mixing: Share of contrast medium that an aneurysm lacks.
        bone: Intensity of the skull base that subtraction left behind.
        cupping: Loss of intensity from the border to the centre, by beam hardening.
        streaks: Amplitude of streaks from dense contrast medium, by beam hardening.
        bias: Standard deviation of the logarithm of the multiplicative bias field.
        gamma: Exponent of the intensities.
        floor: Intensities below are cut off, as by a window; None cuts nothing.
        scale: Grey levels of one unit.
        offset: Grey level of soft tissue.
    """

    field_of_view: float
    calibre: tuple[float, float]
    sac: tuple[float, float]
    second_sac: float
    tortuosity: float
    blur: float
    slice_thickness: float
    noise: float
    grain: float
    texture: float
    mixing: float
    bone: float
    cupping: float
    streaks: float
    bias: float
    gamma: float
    floor: float | None
    scale: float
    offset: float


# fmt: off
CENTRES = {
    # Sharp, with little noise.
    "centre_a": Centre(
        field_of_view=36.0, calibre=(1.7, 0.15), sac=(3.6, 0.20), second_sac=0.1, tortuosity=1.0,
        blur=0.25, slice_thickness=0.0, noise=0.04, grain=0.3, texture=0.03, mixing=0.05,
        bone=0.0, cupping=0.08, streaks=0.03, bias=0.05, gamma=1.0, floor=None,
        scale=1000.0, offset=200.0,
    ),
    # Subtracted and windowed: the background is cut off, and thin vessels with it.
    "centre_b": Centre(
        field_of_view=42.0, calibre=(1.9, 0.20), sac=(4.4, 0.25), second_sac=0.1, tortuosity=1.3,
        blur=0.35, slice_thickness=0.0, noise=0.07, grain=0.0, texture=0.05, mixing=0.10,
        bone=0.0, cupping=0.15, streaks=0.05, bias=0.15, gamma=1.5, floor=0.12,
        scale=230.0, offset=0.0,
    ),
    # Not subtracted: bone stays; strong beam hardening, thick slices.
    "centre_c": Centre(
        field_of_view=34.0, calibre=(1.5, 0.15), sac=(3.1, 0.25), second_sac=0.2, tortuosity=0.8,
        blur=0.45, slice_thickness=1.2, noise=0.07, grain=0.6, texture=0.06, mixing=0.20,
        bone=0.55, cupping=0.30, streaks=0.14, bias=0.20, gamma=0.8, floor=None,
        scale=1400.0, offset=-150.0,
    ),
    # An old system: blurred, noisy, uneven; little contrast medium reaches the sac.
    "centre_d": Centre(
        field_of_view=38.0, calibre=(1.6, 0.20), sac=(3.5, 0.30), second_sac=0.1, tortuosity=1.1,
        blur=0.60, slice_thickness=0.0, noise=0.10, grain=0.4, texture=0.08, mixing=0.30,
        bone=0.25, cupping=0.20, streaks=0.10, bias=0.30, gamma=0.9, floor=-0.1,
        scale=100.0, offset=40.0,
    ),
}
# fmt: on
"""Four centres, as many as the paper's; their aneurysms are larger than most, in a narrow field."""
