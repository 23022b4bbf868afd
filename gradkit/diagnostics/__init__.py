"""Diagnostics: what the steps of a training did to gradients, as columns of numbers and figures."""

from gradkit.diagnostics.plots import plot, plot_parameters
from gradkit.diagnostics.recorder import Recorder

__all__ = ["Recorder", "plot", "plot_parameters"]
