"""Losses that published methods bring along."""

from gradkit.losses.boundary_contrast import (
    boundary_aware_contrast,
    high_pass,
    pair_contrast,
)

__all__ = ["boundary_aware_contrast", "high_pass", "pair_contrast"]
