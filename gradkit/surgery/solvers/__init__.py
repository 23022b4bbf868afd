"""Exact solvers for the small convex problems of gradient surgery.

All solvers take Gram matrices, batched over leading dimensions. They compute in float64 on the
matrices' device (in float32 where there is no float64), and return NaN for a matrix that is not
finite. None of them is differentiable.
"""

from gradkit.surgery.solvers.conflict_averse import conflict_averse
from gradkit.surgery.solvers.dual_cone import project_onto_dual_cone
from gradkit.surgery.solvers.fair import fair_weights
from gradkit.surgery.solvers.least_distance import least_distance
from gradkit.surgery.solvers.nonnegative import nonnegative_minimum
from gradkit.surgery.solvers.simplex import project_onto_simplex, simplex_minimum

__all__ = [
    "conflict_averse",
    "fair_weights",
    "least_distance",
    "nonnegative_minimum",
    "project_onto_dual_cone",
    "project_onto_simplex",
    "simplex_minimum",
]
