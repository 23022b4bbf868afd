"""The nearest vector that has enough of each gradient."""

from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch

from gradkit.surgery.solvers import least_distance
from surgery.problems import gram, normal


def test_least_distance_agrees_with_quadprog() -> None:
    for seed, (count, width) in enumerate([(2, 3), (4, 6), (8, 12), (5, 5)]):
        rows = normal(count, width, seed=seed)
        bounds = normal(count - 1, seed=seed + 50)
        weights, feasible = least_distance(gram(rows), bounds)
        expected = quadprog.solve_qp(
            np.eye(width), rows[0].numpy(), rows[1:].T.contiguous().numpy(), bounds.numpy()
        )[0]
        assert feasible
        assert weights[0] == 1
        np.testing.assert_allclose(weights @ rows, expected, atol=1e-10)


def test_least_distance_without_a_solution() -> None:
    matrix = gram(torch.tensor([[1.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]).double())
    batch = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]).double()
    weights, feasible = least_distance(matrix.expand(3, 3, 3), batch)
    assert feasible.tolist() == [False, True, True]
    assert weights[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(matrix[2] @ weights[2], torch.zeros(()).double())
    with pytest.raises(ValueError, match="one for each row but the first"):
        least_distance(matrix, torch.zeros(3).double())
