"""Synthetic T2-weighted slices of the prostate: pelves drawn by anatomy, seen by six scanners."""

from examples.prostate.synthetic.sites import SITES
from examples.prostate.synthetic.slices import SyntheticProstate

__all__ = ["SITES", "SyntheticProstate"]
