"""Learning rates and look-ahead points from the agreement of two gradients."""

from gradkit.alignment.cosine_lr import CosineLR
from gradkit.alignment.look_ahead import LookAhead

__all__ = ["CosineLR", "LookAhead"]
