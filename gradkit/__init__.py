"""gradkit: gradients bent before they are applied, round any torch optimizer."""

from gradkit import testing, tta
from gradkit.gradients import Gradients
from gradkit.lookahead import LookAhead
from gradkit.nonfinite import NonFiniteError
from gradkit.optimizer import GradientOptimizer
from gradkit.oracle import Context, Oracle, Transform
from gradkit.processes import RankError
from gradkit.recipes import GraTa
from gradkit.record import StepRecord
from gradkit.sharpness import SAM
from gradkit.step_size import CosineLR
from gradkit.surgery import Mean, PCGrad, Sum
from gradkit.teacher import EMA, GatedEMA
from gradkit.wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SAM",
    "Context",
    "CosineLR",
    "GatedEMA",
    "GraTa",
    "GradientOptimizer",
    "Gradients",
    "LookAhead",
    "Mean",
    "NonFiniteError",
    "Oracle",
    "PCGrad",
    "RankError",
    "StepRecord",
    "Sum",
    "Transform",
    "testing",
    "tta",
    "wrap",
]
