"""Loss weighting: weights of objectives computed from their losses only."""

from gradkit.weighting.dwa import DWA
from gradkit.weighting.famo import FAMO
from gradkit.weighting.gls import GLS
from gradkit.weighting.loss_weighting import LossWeighting
from gradkit.weighting.rlw import RLW
from gradkit.weighting.stch import STCH
from gradkit.weighting.uw import UW

__all__ = ["DWA", "FAMO", "GLS", "RLW", "STCH", "UW", "LossWeighting"]
