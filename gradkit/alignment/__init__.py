"""Gradient alignment: learning rates from cosines, and look-ahead gradients."""

from gradkit.alignment.cosine_lr import CosineLR
from gradkit.alignment.look_ahead import LookAhead

__all__ = ["CosineLR", "LookAhead"]
