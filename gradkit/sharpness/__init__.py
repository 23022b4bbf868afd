"""Sharpness-aware minimization."""

from gradkit.sharpness.aesam import AESAM
from gradkit.sharpness.asam import ASAM
from gradkit.sharpness.ascent import Ascent
from gradkit.sharpness.bsam import BSAM
from gradkit.sharpness.crsam import CRSAM
from gradkit.sharpness.disam import DISAM
from gradkit.sharpness.esam import ESAM
from gradkit.sharpness.friendly_sam import FriendlySAM
from gradkit.sharpness.gam import GAM
from gradkit.sharpness.gsam import GSAM
from gradkit.sharpness.looksam import LookSAM
from gradkit.sharpness.measure import SharpnessReport, report
from gradkit.sharpness.mesa import mesa
from gradkit.sharpness.msam import MSAM
from gradkit.sharpness.rho import RhoByLR
from gradkit.sharpness.sagm import SAGM
from gradkit.sharpness.sam import SAM
from gradkit.sharpness.sampa import SAMPa
from gradkit.sharpness.slow_weights import SlowWeights
from gradkit.sharpness.vasso import VaSSO
from gradkit.sharpness.wsam import WSAM

__all__ = [
    "AESAM",
    "ASAM",
    "BSAM",
    "CRSAM",
    "DISAM",
    "ESAM",
    "GAM",
    "GSAM",
    "MSAM",
    "SAGM",
    "SAM",
    "WSAM",
    "Ascent",
    "FriendlySAM",
    "LookSAM",
    "RhoByLR",
    "SAMPa",
    "SharpnessReport",
    "SlowWeights",
    "VaSSO",
    "mesa",
    "report",
]
