"""Quadratic programs over the nonnegative orthant."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradkit.surgery.solvers.active_set import Quadratic, approach, minimise
from gradkit.surgery.solvers.prepared import prepare

# The slope, relative to q, above which the objective counts as unbounded. A ray along which it
# falls more slowly counts as one along which it does not fall.
_UNBOUNDED = 1e-6
# The numbers of rows, and of problems with one matrix, from which projected gradient steps pay off.
_MANY = 48
_FEW = 8


@torch.no_grad()
def nonnegative_minimum(
    gram: Float[Tensor, "*batch K K"], linear: Float[Tensor, "*batch K"]
) -> tuple[Float[Tensor, "*batch K"], Bool[Tensor, "*batch"]]:
    """The minimiser z of ½zᵀGz + qᵀz over z ≥ 0.

    Args:
        gram: G, semidefinite up to rounding errors.
        linear: q.

    Returns:
        z, and whether the objective is bounded below. If it is not, z is 0.

    Examples:
        >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> nonnegative_minimum(gram, torch.tensor([1.0, -1.0]))
        (tensor([0., 1.]), tensor(True))
        >>> nonnegative_minimum(gram, torch.tensor([0.0, -1.0]))
        (tensor([0., 0.]), tensor(False))
    """
    cosines, norms, finite = prepare(gram)
    point, missed = solve(cosines, linear.to(norms) / norms)
    zero = gram.diagonal(dim1=-2, dim2=-1) <= 0
    bounded = (missed <= _UNBOUNDED) & ~(zero & (linear < 0)).any(-1)
    finite = finite & linear.isfinite().all(-1)
    weights = (point / norms).masked_fill(~bounded[..., None], 0)
    return weights.masked_fill(~finite[..., None], torch.nan).to(gram.dtype), bounded & finite


def solve(
    cosines: Float[Tensor, "*#batch K K"], linear: Float[Tensor, "*batch K"]
) -> tuple[Float[Tensor, "*batch K"], Float[Tensor, "*batch"]]:
    """The minimiser for a prepared matrix, and its stationarity residual relative to max |q|.

    Examples:
        >>> solve(torch.eye(2, dtype=torch.float64), torch.tensor([1.0, -3.0]).double())[0]
        tensor([0., 3.], dtype=torch.float64)
    """
    count = linear.shape[-1]
    size = linear.abs().amax(-1, keepdim=True)
    usable = (size > 0) & size.isfinite()
    scaled = torch.where(usable, linear / size, 0.0)
    if count < _MANY or linear.dim() < 2 or cosines.shape[-3] > 1:
        if cosines.numel() > count**2:
            cosines = cosines.expand(*linear.shape, count)
        problem = Quadratic(cosines.reshape(-1, count, count), scaled.reshape(-1, count))
        point, _, missed = minimise(problem, problem.linear < 0)
    else:
        # Several problems for each matrix.
        matrices = cosines.expand(*linear.shape[:-2], 1, count, count).reshape(-1, 1, count, count)
        targets = scaled.reshape(-1, linear.shape[-2], count)
        parts = [_solve_together(Quadratic(*each)) for each in zip(matrices, targets, strict=True)]
        point = torch.stack([part[0] for part in parts])
        missed = torch.stack([part[1] for part in parts])
    return point.reshape(linear.shape) * size, missed.reshape(linear.shape[:-1])


def _solve_together(problem: Quadratic) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    """As `minimise`, for problems that share one matrix."""
    if len(problem.linear) < _FEW:
        point, _, missed = minimise(problem, problem.linear < 0)
    else:
        near = approach(problem)
        point, _, missed = minimise(problem, near > 0, near=near)
    return point, missed
