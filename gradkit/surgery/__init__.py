"""Gradient surgery: one direction from the gradients of several objectives."""

from gradkit.surgery.aggregate import Aggregate
from gradkit.surgery.agreement import AgrRand, AgrSum
from gradkit.surgery.aligned_mtl import AlignedMTL
from gradkit.surgery.and_mask import ANDMask, SANDMask
from gradkit.surgery.cagrad import CAGrad
from gradkit.surgery.config import ConFIG
from gradkit.surgery.constant import Constant
from gradkit.surgery.cosine_gate import CosineGate
from gradkit.surgery.cr_mogm import CRMOGM
from gradkit.surgery.db_mtl import DBMTL
from gradkit.surgery.dualproj import DualProj
from gradkit.surgery.elementwise import ElementwiseRule
from gradkit.surgery.excess_mtl import ExcessMTL
from gradkit.surgery.fairgrad import FairGrad
from gradkit.surgery.fish import Fish
from gradkit.surgery.fixed import Mean, Sum
from gradkit.surgery.graddrop import GradDrop
from gradkit.surgery.gradnorm import GradNorm
from gradkit.surgery.gradvac import GradVac
from gradkit.surgery.gsmorph import GSMorph
from gradkit.surgery.idgm import IDGM
from gradkit.surgery.imtlg import IMTLG
from gradkit.surgery.inputs import RuleInputs
from gradkit.surgery.krum import Krum
from gradkit.surgery.mgda import MGDA
from gradkit.surgery.mldg import MLDG
from gradkit.surgery.moco import MoCo
from gradkit.surgery.modo import MoDo
from gradkit.surgery.nash_mtl import NashMTL
from gradkit.surgery.pcd import PCD
from gradkit.surgery.pcgrad import PCGrad
from gradkit.surgery.random_weights import RandomWeights
from gradkit.surgery.rule import GramRule, Rule
from gradkit.surgery.sdmgrad import SDMGrad
from gradkit.surgery.trimmed_mean import TrimmedMean
from gradkit.surgery.upgrad import UPGrad
from gradkit.surgery.vectors import VectorRule
from gradkit.surgery.weighing import Remembering, Weighting

__all__ = [
    "CRMOGM",
    "DBMTL",
    "IDGM",
    "IMTLG",
    "MGDA",
    "MLDG",
    "PCD",
    "ANDMask",
    "Aggregate",
    "AgrRand",
    "AgrSum",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "CosineGate",
    "DualProj",
    "ElementwiseRule",
    "ExcessMTL",
    "FairGrad",
    "Fish",
    "GSMorph",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GramRule",
    "Krum",
    "Mean",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "RandomWeights",
    "Remembering",
    "Rule",
    "RuleInputs",
    "SANDMask",
    "SDMGrad",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "VectorRule",
    "Weighting",
]
