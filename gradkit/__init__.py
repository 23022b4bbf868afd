"""gradkit: gradients bent before they are applied, round any torch optimizer."""

from gradkit import testing, tta, weighting
from gradkit.gradients import Gradients
from gradkit.lookahead import LookAhead
from gradkit.nonfinite import NonFiniteError
from gradkit.objectives import NoGradientError
from gradkit.optimizer import GradientOptimizer
from gradkit.oracle import Context, Oracle, Transform
from gradkit.processes import RankError
from gradkit.recipes import GraTa
from gradkit.record import StepRecord
from gradkit.sharpness import SAM
from gradkit.step_size import CosineLR
from gradkit.surgery import (
    CRMOGM,
    DBMTL,
    IDGM,
    IMTLG,
    MGDA,
    MLDG,
    PCD,
    Aggregate,
    AgrRand,
    AgrSum,
    AlignedMTL,
    ANDMask,
    CAGrad,
    ConFIG,
    Constant,
    CosineGate,
    DualProj,
    ExcessMTL,
    FairGrad,
    Fish,
    GradDrop,
    GradNorm,
    GradVac,
    GSMorph,
    Krum,
    Mean,
    MoDo,
    NashMTL,
    PCGrad,
    RandomWeights,
    SANDMask,
    SDMGrad,
    Sum,
    TrimmedMean,
    UPGrad,
)
from gradkit.teacher import EMA, GatedEMA
from gradkit.weighting import DWA, FAMO, GLS, RLW, STCH, UW
from gradkit.wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "CRMOGM",
    "DBMTL",
    "DWA",
    "EMA",
    "FAMO",
    "GLS",
    "IDGM",
    "IMTLG",
    "MGDA",
    "MLDG",
    "PCD",
    "RLW",
    "SAM",
    "STCH",
    "UW",
    "ANDMask",
    "Aggregate",
    "AgrRand",
    "AgrSum",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "Context",
    "CosineGate",
    "CosineLR",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "Fish",
    "GSMorph",
    "GatedEMA",
    "GraTa",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientOptimizer",
    "Gradients",
    "Krum",
    "LookAhead",
    "Mean",
    "MoDo",
    "NashMTL",
    "NoGradientError",
    "NonFiniteError",
    "Oracle",
    "PCGrad",
    "RandomWeights",
    "RankError",
    "SANDMask",
    "SDMGrad",
    "StepRecord",
    "Sum",
    "Transform",
    "TrimmedMean",
    "UPGrad",
    "testing",
    "tta",
    "weighting",
    "wrap",
]
