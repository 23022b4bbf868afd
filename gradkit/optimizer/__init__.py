"""The optimizer that wraps a base optimizer: steps, transactions, saved state and checks."""

from gradkit.optimizer.finite_check import NonFiniteError
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.record import StepRecord
from gradkit.optimizer.wrapping import wrap

__all__ = ["GradientOptimizer", "NonFiniteError", "StepRecord", "wrap"]
