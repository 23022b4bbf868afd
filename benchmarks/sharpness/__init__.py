"""How the sharpness-aware methods compare: on a landscape of two wells and on digits."""

from benchmarks.sharpness.command import Sharpness

__all__ = ["Sharpness"]
