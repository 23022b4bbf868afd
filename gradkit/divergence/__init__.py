"""f-divergences between two domains, as losses and as guides of an ascent."""

from gradkit.divergence.ascent import DivergenceAscent
from gradkit.divergence.critic import CriticDivergence, reverse_gradient
from gradkit.divergence.f_divergence import FDivergence
from gradkit.divergence.features import GaussianDivergence
from gradkit.divergence.histogram import HistogramDivergence, log_histogram
from gradkit.divergence.named import f_divergence
from gradkit.divergence.weight import DivergenceWeight

__all__ = [
    "CriticDivergence",
    "DivergenceAscent",
    "DivergenceWeight",
    "FDivergence",
    "GaussianDivergence",
    "HistogramDivergence",
    "f_divergence",
    "log_histogram",
    "reverse_gradient",
]
