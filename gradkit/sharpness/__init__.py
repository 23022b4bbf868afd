"""Sharpness-aware minimization and its relatives."""

from gradkit.sharpness.sam import SAM

__all__ = ["SAM"]
