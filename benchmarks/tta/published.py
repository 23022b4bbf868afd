"""The figures of GraTa's paper: Dice (%) by source domain A to E, and their average.

Chen et al., "Gradient Alignment Improves Test-Time Adaptation for Medical Image Segmentation", AAAI
2025, https://arxiv.org/abs/2408.07343. Its domains are A RIM-ONE-r3, B REFUGE, C ORIGA, D REFUGE's
validation and test images, E Drishti-GS, at 512 pixels, with a network of width 64 that starts from
ImageNet.
"""

from collections.abc import Mapping

DOMAINS = ("A", "B", "C", "D", "E", "average")
Figures = tuple[float, ...]

_NO_ADAPT = (67.96, 76.71, 74.71, 54.07, 68.88, 68.47)
_TENT = (74.06, 78.55, 74.56, 51.45, 69.66, 69.65)
_GRATA = (76.61, 78.81, 76.52, 66.84, 72.94, 74.34)
_SAR = (75.26, 78.07, 75.07, 61.24, 73.69, 72.67)

FIGURES: Mapping[str, Figures] = {
    # Table 1
    "none": _NO_ADAPT,
    "dua": (73.10, 77.10, 75.34, 58.62, 72.99, 71.43),
    "diga": (76.57, 77.10, 73.64, 62.04, 71.54, 72.18),
    "medbn": (75.14, 76.77, 74.46, 59.91, 72.00, 71.65),
    "tent": _TENT,
    "dltta": (75.19, 78.48, 76.37, 57.50, 71.35, 71.78),
    "domainadaptor": (75.88, 77.43, 75.66, 58.64, 72.38, 72.00),
    "sar": _SAR,
    "detta": (75.15, 78.17, 75.27, 61.26, 73.61, 72.69),
    "grata": _GRATA,
    # Table 2
    "con": (78.35, 78.50, 69.24, 52.13, 68.74, 69.39),
    "con-ent-constant": (77.97, 78.77, 73.90, 56.53, 70.46, 71.53),
    # Table 3
    "ent-con": (74.69, 78.46, 75.60, 56.75, 71.86, 71.47),
    # Table 4
    "con-ent-linear": (77.15, 79.11, 76.07, 63.79, 72.42, 73.71),
    "con-ent-sigmoid": (77.31, 79.04, 76.01, 64.69, 72.10, 73.83),
    "con-ent-relu": (75.92, 78.29, 75.16, 62.14, 73.07, 72.92),
    "con-ent-softplus": (77.60, 78.81, 75.44, 63.04, 71.68, 73.32),
}
"""By the name of the variant. SAR's figure is that of an unknown threshold."""

PAIRS: Mapping[tuple[str, str], float] = {
    (pseudo, auxiliary): average
    for pseudo, averages in {
        "con": (None, 74.34, 73.81, 74.08, 74.02, 73.64),
        "ent": (71.47, None, 72.28, 71.43, 71.69, 72.13),
        "rec": (72.84, 72.01, None, 72.59, 72.73, 72.55),
        "rot": (72.76, 72.90, 72.60, None, 72.86, 72.70),
        "sup": (72.81, 72.15, 72.27, 72.04, None, 72.39),
        "den": (72.66, 72.00, 72.46, 71.65, 72.38, None),
    }.items()
    for auxiliary, average in zip(("con", "ent", "rec", "rot", "sup", "den"), averages, strict=True)
    if average is not None
}
"""Averages of Table 5 by pseudo and auxiliary objective. The order of its rows is reconstructed:
Tables 1 and 3 confirm two of them."""


def figures_of(name: str) -> Figures | None:
    """The paper's figures for a variant, whatever our learning rate; None if it has none."""
    return FIGURES.get(name.partition("@")[0])
