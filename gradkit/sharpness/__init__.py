"""Sharpness-aware minimization."""

from gradkit.sharpness.sam import SAM

__all__ = ["SAM"]
