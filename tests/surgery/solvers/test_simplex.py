"""Quadratic programs over the simplex."""

from __future__ import annotations

import pytest
import torch
from helpers import jacobians
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradkit.surgery.solvers import project_onto_simplex, simplex_minimum
from surgery.problems import GRAMS, allowance, gram, least_on_simplex, normal

quick = settings(max_examples=40, deadline=None)
every = pytest.mark.parametrize("matrix", GRAMS.values(), ids=GRAMS.keys())


def assert_least(weights: Tensor, slope: Tensor, scale: Tensor, tolerance: float = 1e-12) -> None:
    """Weights on the simplex, of a value within the Frank-Wolfe gap of the least."""
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(), torch.ones_like(weights.sum()), atol=1e-14, rtol=0)
    assert float((weights * slope).sum() - slope.min()) <= tolerance * float(scale)


@every
@pytest.mark.parametrize("kind", ["none", "mean", "any"])
def test_simplex_minimum_meets_its_optimality_conditions(matrix: Tensor, kind: str) -> None:
    largest = matrix.diagonal().max()
    linear = {
        "none": torch.zeros(len(matrix), dtype=torch.float64),
        "mean": 0.3 * matrix.mean(-1),
        "any": largest * normal(len(matrix), seed=11),
    }[kind]
    weights = simplex_minimum(matrix, None if kind == "none" else linear)
    scale = largest + linear.abs().max()
    assert_least(weights, matrix @ weights + linear, scale, allowance(matrix))


@quick
@given(jacobians(maximum=5), st.integers(0, 3))
def test_simplex_minimum_equals_the_best_of_all_supports(rows: Tensor, times: int) -> None:
    matrix = gram(rows)
    linear = times / 4 * matrix.mean(-1)
    weights = simplex_minimum(matrix, linear)
    value = float(weights @ matrix @ weights / 2 + linear @ weights)
    expected = least_on_simplex(matrix.numpy(), linear.numpy())
    assert value == pytest.approx(expected, abs=1e-11 * float(matrix.diagonal().max()) + 1e-300)


def test_the_shortest_of_rows_of_mixed_lengths_keeps_its_digits() -> None:
    # Orthogonal rows: the weights are in proportion to 1/‖gᵢ‖².
    squares = torch.tensor([1e-12, 1.0, 1e12, 4e-12], dtype=torch.float64)
    expected = (1 / squares) / (1 / squares).sum()
    weights = simplex_minimum(squares.diag())
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0)
    # Between a short and a long opposite row it is the weights that cancel.
    weights = simplex_minimum(gram(torch.tensor([[1.0, 0], [-1e6, 0], [0, 1e6]]).double()))
    assert float(weights[1]) == pytest.approx(1e-6 / (1 + 1e-6), rel=1e-5)


def test_equal_rows_get_equal_weights() -> None:
    weights = simplex_minimum(gram(normal(4, 6, seed=3).repeat(3, 1)))
    torch.testing.assert_close(weights[:4], weights[4:8], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights[:4], weights[8:], rtol=1e-5, atol=1e-7)
    expected = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(simplex_minimum(GRAMS["all equal"]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(simplex_minimum(0 * GRAMS["all equal"]), expected, rtol=0, atol=1e-5)


@quick
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=7))
def test_projection_onto_the_simplex(numbers: list[float]) -> None:
    vector = torch.tensor(numbers, dtype=torch.float64)
    weights = project_onto_simplex(vector)
    assert_least(weights, weights - vector, 1 + vector.abs().max())
    moved = project_onto_simplex(weights)
    torch.testing.assert_close(moved, weights, rtol=0, atol=1e-15)
