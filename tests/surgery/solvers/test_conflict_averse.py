"""The dual problem of CAGrad."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from gradkit.surgery.solvers import conflict_averse
from surgery.problems import EXAMPLE, GRAMS, allowance, gram, normal

every = pytest.mark.parametrize("matrix", GRAMS.values(), ids=GRAMS.keys())


def assert_least(weights: Tensor, slope: Tensor, scale: Tensor, tolerance: float = 1e-12) -> None:
    """Weights on the simplex, of a value within the Frank-Wolfe gap of the least."""
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(), torch.ones_like(weights.sum()), atol=1e-14, rtol=0)
    assert float((weights * slope).sum() - slope.min()) <= tolerance * float(scale)


@every
@pytest.mark.parametrize("c", [0.0, 1e-3, 0.5, 0.9, 1.0, 4.0])
def test_conflict_averse_meets_its_optimality_conditions(matrix: Tensor, c: float) -> None:
    mean = torch.full_like(matrix[0], 1 / len(matrix))
    weights = conflict_averse(matrix, c)
    toward = matrix @ mean
    radius = c * (toward @ mean).clamp(min=0).sqrt()
    length = (weights @ matrix @ weights).clamp(min=0).sqrt()
    largest = matrix.diagonal().max()
    if allowance(matrix) > 1e-12:
        # The least value is not even known to be real.
        assert_least(weights, toward * 0, largest)
        return
    if length <= 1e-7 * largest.sqrt():
        # ‖g_w‖ has no slope at 0; the objective is 0 there, and by how much less it may be is
        # seen at the points on the way to each vertex.
        assert_least(weights, toward * 0, largest)
        ends = torch.eye(len(matrix)).double()
        for part in [1e-3, 0.03, 0.3, 1.0]:
            points = (1 - part) * weights + part * ends
            values = points @ toward + radius * (points @ matrix * points).sum(-1).clamp(0).sqrt()
            assert (values >= -(1e-8 + allowance(matrix) ** 0.5) * largest).all()
        return
    assert_least(weights, toward + radius * (matrix @ weights) / length, (1 + c) * largest, 1e-11)


def test_conflict_averse_agrees_with_a_general_minimiser() -> None:
    matrix = gram(normal(4, 3, seed=21) + 0.5).numpy()
    mean = np.full(4, 0.25)

    def objective(w: np.ndarray) -> float:
        return w @ matrix @ mean + 0.5 * np.sqrt(mean @ matrix @ mean) * np.sqrt(w @ matrix @ w)

    total = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(objective, mean, bounds=[(0, 1)] * 4, constraints=[total], tol=1e-12)
    weights = conflict_averse(torch.from_numpy(matrix), 0.5)
    assert objective(weights.numpy()) <= found.fun + 1e-9
    np.testing.assert_allclose(weights, found.x, atol=1e-4)


def test_conflict_averse_without_a_mean() -> None:
    # g₀ = 0, exactly and up to rounding
    for rows in (torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.1], [0.2], [-0.3]])):
        expected = torch.full((len(rows),), 1 / len(rows)).double()
        torch.testing.assert_close(conflict_averse(gram(rows.double()), 0.5), expected)
    with pytest.raises(ValueError, match="c is -1"):
        conflict_averse(EXAMPLE, -1.0)
