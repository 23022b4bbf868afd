"""Test-time adaptation: statistics × objectives × transforms × optimizer."""

from gradkit.tta.adapter import Adapter
from gradkit.tta.augment import StrongAugmentation
from gradkit.tta.grata import GraTa
from gradkit.tta.no_adapt import NoAdapt
from gradkit.tta.objectives import Consistency, binary_entropy, entropy, softmax_entropy
from gradkit.tta.ptbn import PTBN
from gradkit.tta.statistics import (
    Mixed,
    Statistics,
    install_statistics,
    norm_affine_parameters,
)
from gradkit.tta.tent import TENT
from gradkit.tta.views import WEAK_VIEWS, View

__all__ = [
    "PTBN",
    "TENT",
    "WEAK_VIEWS",
    "Adapter",
    "Consistency",
    "GraTa",
    "Mixed",
    "NoAdapt",
    "Statistics",
    "StrongAugmentation",
    "View",
    "binary_entropy",
    "entropy",
    "install_statistics",
    "norm_affine_parameters",
    "softmax_entropy",
]
