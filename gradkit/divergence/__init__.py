"""f-divergences between two domains."""

from gradkit.divergence.f_divergence import FDivergence
from gradkit.divergence.named import f_divergence

__all__ = ["FDivergence", "f_divergence"]
