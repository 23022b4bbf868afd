"""What holds of every solver: batches, NaNs, dtypes, scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import jacobians
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradkit.surgery.solvers import (
    conflict_averse,
    fair_weights,
    least_distance,
    project_onto_dual_cone,
    simplex_minimum,
)
from surgery.problems import gram, normal

quick = settings(max_examples=40, deadline=None)


def cone(matrix: Tensor) -> Tensor:
    target = torch.full((1, matrix.shape[-1]), 1.0, dtype=matrix.dtype)
    return project_onto_dual_cone(matrix, target.expand(*matrix.shape[:-2], -1, -1))[..., 0, :]


def nearest(matrix: Tensor) -> Tensor:
    return least_distance(matrix, 0.1 * matrix[..., 1:, 0].abs())[0]


SOLVERS = {
    "simplex_minimum": simplex_minimum,
    "conflict_averse": lambda matrix: conflict_averse(matrix, 0.5),
    "project_onto_dual_cone": cone,
    "least_distance": nearest,
    "fair_weights": fair_weights,
}
all_solvers = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())


@all_solvers
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_batch_is_its_members(solve, count: int) -> None:
    if solve is nearest and count == 1:
        return
    matrices = gram(normal(3, 7, count, 4, seed=2))
    matrices[0, 1], matrices[2, 3] = 0, matrices[2, 3] * 1e9
    together = solve(matrices)
    assert together.shape == (3, 7, count)
    for index in np.ndindex(3, 7):
        direction = matrices[index] @ together[index]
        alone = matrices[index] @ solve(matrices[index])
        scale = float(matrices[index].diagonal().max())
        torch.testing.assert_close(direction, alone, rtol=1e-6, atol=1e-8 * scale)
    assert solve(matrices[:0]).shape == (0, 7, count)


@all_solvers
@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(solve, count: int, bad: float) -> None:
    if solve is nearest and count == 1:
        return
    matrices = gram(normal(2, count, 5))
    matrices[0, -1, -1] = bad
    weights = solve(matrices)
    # The weight of the first gradient is given in least_distance.
    assert weights[0, solve is nearest :].isnan().all()
    assert weights[1].isfinite().all()


@all_solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(solve, dtype: torch.dtype) -> None:
    matrix = gram(normal(3, 5)).to(dtype).requires_grad_()
    weights = solve(matrix)
    assert weights.dtype == dtype
    assert not weights.requires_grad
    torch.testing.assert_close(weights, solve(matrix.double()).to(dtype), rtol=1e-5, atol=1e-6)


@quick
@given(jacobians(minimum=3), st.integers(-40, 40), st.randoms(use_true_random=False))
def test_directions_scale_and_do_not_depend_on_the_order(rows: Tensor, power: int, random) -> None:
    matrix = gram(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    scale = float(matrix.diagonal().max())
    for name in ("simplex_minimum", "project_onto_dual_cone"):
        solve = SOLVERS[name]
        direction = solve(matrix) @ rows
        scaled = solve(matrix * 2.0**power) @ rows
        shuffled = solve(matrix[order][:, order]) @ rows[order]
        size = 1e-6 * (1 + scale**0.5)
        torch.testing.assert_close(scaled, direction, rtol=0, atol=size)
        torch.testing.assert_close(shuffled, direction, rtol=0, atol=size)
