"""The optimizer round the base, and what one step needs: undo, commit, state, checks."""

from gradkit.optimizer.finite_check import NonFiniteError
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.record import StepRecord
from gradkit.optimizer.wrapping import wrap

__all__ = ["GradientOptimizer", "NonFiniteError", "StepRecord", "wrap"]
