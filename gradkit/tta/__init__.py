"""Test-time adaptation: statistics × objectives × transforms × optimizer × prediction."""

from gradkit.tta.adapter import Adapter
from gradkit.tta.augment import StrongAugmentation
from gradkit.tta.cotta import CoTTA, TeacherTarget
from gradkit.tta.detta import Denoising, DeTTA
from gradkit.tta.deyo import DeYO, ShapeEntropy
from gradkit.tta.diga import DIGA, PrototypePredictor
from gradkit.tta.distilled_fuse import DistilledFuse, FusedTarget
from gradkit.tta.dltta import DLTTA, DLTTAPreset
from gradkit.tta.domain_adaptor import GEM, AdaMixBN, DomainAdaptor
from gradkit.tta.dua import DUA, DynamicStatistics
from gradkit.tta.eata import EATA, ActiveEntropy
from gradkit.tta.fuse import Alternatives, Fuse, Fusion
from gradkit.tta.grata import GraTa
from gradkit.tta.heads import ROTATION_VIEWS, Reconstruction, Rotation, SuperResolution
from gradkit.tta.intent import Integration, InTEnt, Interpolated
from gradkit.tta.lower_entropy import LowerEntropy
from gradkit.tta.medbn import MedBN, Median
from gradkit.tta.memo import MEMO, MarginalEntropy
from gradkit.tta.no_adapt import NoAdapt
from gradkit.tta.objectives import Consistency, binary_entropy, entropy, softmax_entropy
from gradkit.tta.pass_tta import PASS, MomentumStart, SourceAlignment
from gradkit.tta.ptbn import PTBN
from gradkit.tta.restore import PeriodicRestart, Pull, RestartBelow, StochasticRestore
from gradkit.tta.rotta import MemoryConsistency, RoTTA
from gradkit.tta.running import RunningStatistics
from gradkit.tta.sar import SAR, ReliableEntropy
from gradkit.tta.statistics import (
    Mixed,
    Statistics,
    install_statistics,
    norm_affine_parameters,
)
from gradkit.tta.tent import TENT
from gradkit.tta.views import WEAK_VIEWS, View
from gradkit.tta.vptta import VPTTA, WarmUp

__all__ = [
    "DIGA",
    "DLTTA",
    "DUA",
    "EATA",
    "GEM",
    "MEMO",
    "PASS",
    "PTBN",
    "ROTATION_VIEWS",
    "SAR",
    "TENT",
    "VPTTA",
    "WEAK_VIEWS",
    "ActiveEntropy",
    "AdaMixBN",
    "Adapter",
    "Alternatives",
    "CoTTA",
    "Consistency",
    "DLTTAPreset",
    "DeTTA",
    "DeYO",
    "Denoising",
    "DistilledFuse",
    "DomainAdaptor",
    "DynamicStatistics",
    "Fuse",
    "FusedTarget",
    "Fusion",
    "GraTa",
    "InTEnt",
    "Integration",
    "Interpolated",
    "LowerEntropy",
    "MarginalEntropy",
    "MedBN",
    "Median",
    "MemoryConsistency",
    "Mixed",
    "MomentumStart",
    "NoAdapt",
    "PeriodicRestart",
    "PrototypePredictor",
    "Pull",
    "Reconstruction",
    "ReliableEntropy",
    "RestartBelow",
    "RoTTA",
    "Rotation",
    "RunningStatistics",
    "ShapeEntropy",
    "SourceAlignment",
    "Statistics",
    "StochasticRestore",
    "StrongAugmentation",
    "SuperResolution",
    "TeacherTarget",
    "View",
    "WarmUp",
    "binary_entropy",
    "entropy",
    "install_statistics",
    "norm_affine_parameters",
    "softmax_entropy",
]
