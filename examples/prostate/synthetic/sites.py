"""The synthetic sites: which scanner each of them has, and whom it examines."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """The statistics of one site.

    A pair is a normal distribution's (mean, deviation).

    Attributes:
        field_of_view: Side of the square image, mm.
        endorectal: Share of patients that are examined with a coil in the rectum, which is bright
            close to it and flattens the gland; the others have a surface coil.
        unevenness: Deviation of a surface coil's sensitivity across the image.
        contrast: Exponent of the signal: above 1 fluid stands out, below 1 all is grey.
        zones: How far the peripheral zone is brighter than the rest of the gland, about 0 to 1.
        fat: Signal of fat, where fluid has 1; low where fat is suppressed.
        noise: Deviation of the noise of each of the receiver's two channels, where fluid has 1.
        resolution: Width of a sampled pixel (full width at half maximum of its blur), mm.
        saturation: Share of the brightest pixels that the grey window cuts off.
        size: Half-width of the gland, mm.
        offset: Deviation of the gland's middle from the image's, along each axis, mm.
    """

    field_of_view: float
    endorectal: float
    unevenness: float
    contrast: float
    zones: float
    fat: float
    noise: float
    resolution: float
    saturation: float
    size: tuple[float, float]
    offset: float


SITES: dict[str, Site] = {
    # 3 T with a surface coil: sharp, even, a wide view; the usual labelled site.
    "site_a": Site(
        field_of_view=180, endorectal=0.0, unevenness=0.12, contrast=1.0, zones=1.0, fat=0.80,
        noise=0.025, resolution=0.7, saturation=0.01, size=(25.0, 3.0), offset=5.0,
    ),
    # 1.5 T with an endorectal coil: a close view that flares towards the rectum.
    "site_b": Site(
        field_of_view=130, endorectal=1.0, unevenness=0.10, contrast=1.1, zones=0.9, fat=0.75,
        noise=0.035, resolution=0.8, saturation=0.03, size=(25.0, 3.5), offset=4.0,
    ),
    # 3 T, coils of either kind, a hard window.
    "site_c": Site(
        field_of_view=150, endorectal=0.5, unevenness=0.20, contrast=1.35, zones=0.75, fat=0.70,
        noise=0.03, resolution=0.7, saturation=0.06, size=(26.0, 4.0), offset=6.0,
    ),
    # 1.5 T with a surface coil: noisy and soft, little contrast between zones.
    "site_d": Site(
        field_of_view=200, endorectal=0.0, unevenness=0.25, contrast=0.8, zones=0.4, fat=0.88,
        noise=0.075, resolution=1.6, saturation=0.02, size=(24.0, 3.5), offset=7.0,
    ),
    # Fat-suppressed: dark surroundings, bright fluid.
    "site_e": Site(
        field_of_view=170, endorectal=0.0, unevenness=0.20, contrast=1.0, zones=0.8, fat=0.30,
        noise=0.05, resolution=1.1, saturation=0.02, size=(28.0, 4.5), offset=6.0,
    ),
    # An old protocol: a close view, coarse pixels, strong shading, large glands.
    "site_f": Site(
        field_of_view=140, endorectal=0.15, unevenness=0.40, contrast=0.7, zones=0.55, fat=0.72,
        noise=0.05, resolution=2.0, saturation=0.02, size=(29.0, 4.5), offset=6.0,
    ),
}  # fmt: skip
"""Six sites, after the kinds of scanner that public prostate collections mix."""
