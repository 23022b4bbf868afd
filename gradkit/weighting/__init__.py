"""Loss weighting: weights of objectives computed from their losses only."""

from gradkit.weighting.cosmos import COSMOS
from gradkit.weighting.dwa import DWA
from gradkit.weighting.famo import FAMO
from gradkit.weighting.gls import GLS
from gradkit.weighting.imtll import IMTLL
from gradkit.weighting.loss_weighting import LossWeighting
from gradkit.weighting.pbi import PBI
from gradkit.weighting.rlw import RLW
from gradkit.weighting.stch import STCH
from gradkit.weighting.uw import UW

__all__ = ["COSMOS", "DWA", "FAMO", "GLS", "IMTLL", "PBI", "RLW", "STCH", "UW", "LossWeighting"]
