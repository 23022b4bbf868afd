"""The projection onto the dual cone."""

from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch
from torch import Tensor

from gradkit.surgery.solvers import project_onto_dual_cone
from surgery.problems import GRAMS, allowance, gram, normal

every = pytest.mark.parametrize("matrix", GRAMS.values(), ids=GRAMS.keys())


def assert_complementary(
    point: Tensor, slope: Tensor, lengths: Tensor, scale: float, tolerance: float
) -> None:
    """Optimality of point ≥ 0 for each coordinate in units of its row's length."""
    assert point.isfinite().all()
    assert (point >= 0).all()
    usable = lengths.clamp(min=1e-300)
    size = scale + float((point * usable).abs().max())
    assert float((slope / usable).min()) >= -tolerance * size
    assert float((point * slope).abs().max()) <= tolerance * size**2


@every
@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_dual_cone_projection_meets_its_optimality_conditions(matrix: Tensor, ridge: float) -> None:
    count = len(matrix)
    if ridge:
        matrix = matrix / matrix.trace().clamp(min=1e-300) + ridge * torch.eye(count)
    targets = torch.cat([torch.eye(count), torch.full((1, count), 1 / count)]).double()
    lengths = matrix.diagonal().sqrt()
    for target, point in zip(targets, project_onto_dual_cone(matrix, targets), strict=True):
        scale = float((target * lengths).max())
        tolerance = max(allowance(matrix), 1e-11)
        slope = matrix @ point
        assert (point >= target).all()
        assert_complementary(point - target, slope, lengths, scale, tolerance)


@pytest.mark.parametrize("shape", [(4, 3), (6, 30), (12, 13), (40, 45)])
def test_dual_cone_projection_agrees_with_quadprog(shape: tuple[int, int]) -> None:
    count = shape[0]
    matrix = gram(normal(*shape, seed=4))
    matrix = matrix / matrix.trace() + 1e-4 * torch.eye(count)
    points = project_onto_dual_cone(matrix, torch.eye(count).double())
    for target, point in zip(np.eye(count), points, strict=True):
        expected = quadprog.solve_qp(matrix.numpy(), np.zeros(count), np.eye(count), target)[0]
        np.testing.assert_allclose(point, expected, atol=1e-8)
