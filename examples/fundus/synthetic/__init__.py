"""Synthetic fundus photographs: eyes drawn by anatomy, seen through the cameras of five centres.

`export` is a module of its own, since it also needs what reads photographs.
"""

from examples.fundus.synthetic.centres import CENTRES
from examples.fundus.synthetic.photographs import SyntheticFundus

__all__ = ["CENTRES", "SyntheticFundus"]
