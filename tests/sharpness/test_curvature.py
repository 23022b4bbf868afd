"""Lanczos' and Hutchinson's methods against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradkit.sharpness.curvature import estimated_trace, largest_eigenvalues


def with_eigenvalues(values: list[float], seed: int) -> Tensor:
    draw = torch.randn(len(values), len(values), generator=seeded(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(draw)
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def found_in(matrix: Tensor, count: int, tolerance: float = 1e-10, iterations: int = 99):
    return largest_eigenvalues(
        matrix.mv,
        matrix[0],
        count,
        iterations=iterations,
        tolerance=tolerance,
        generator=seeded(1),
    )


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-50, 50), min_size=2, max_size=12, unique_by=round),
    seed=st.integers(0, 99),
)
def test_all_eigenvalues_of_a_small_matrix(values: list[float], seed: int) -> None:
    matrix = with_eigenvalues(values, seed)
    size = max(map(abs, values))
    found = found_in(matrix, len(values), tolerance=1e-12)
    expected = sorted(values, reverse=True)
    assert found.values == pytest.approx(expected, abs=1e-10 * max(size, 1))
    residual = matrix @ found.vector - found.values[0] * found.vector
    assert float(residual.norm()) <= found.errors[0] + 1e-12 * size
    assert float(found.vector.norm()) == pytest.approx(1)


@pytest.mark.parametrize(
    "values", [[3.0] * 5, [2.0, 2.0, 1.0, 1.0, -9.0], [0.0] * 4], ids=["one", "pairs", "zero"]
)
def test_multiple_eigenvalues_are_found_after_an_invariant_subspace(values: list[float]) -> None:
    matrix = with_eigenvalues(values, 3)
    found = found_in(matrix, len(values))
    assert found.values == pytest.approx(sorted(values, reverse=True), abs=1e-10)


def test_few_products_find_the_outer_eigenvalues_of_a_large_matrix() -> None:
    values = [*torch.linspace(-1, 1, 298).tolist(), 30.0, 20.0]
    products = 0
    matrix = with_eigenvalues(values, 0)

    def product(vector: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ vector

    found = largest_eigenvalues(
        product, matrix[0], 2, iterations=50, tolerance=1e-6, generator=seeded(0)
    )
    assert found.values == pytest.approx([30, 20], rel=1e-10)
    assert products < 12


def test_residuals_bound_the_error_where_iterations_run_out() -> None:
    matrix = with_eigenvalues(torch.linspace(0, 10, 60).tolist(), 5)
    found = found_in(matrix, 1, iterations=5)
    assert found.errors[0] > 0.01
    distance = torch.linspace(0, 10, 60) - found.values[0]
    assert float(distance.abs().min()) <= found.errors[0]
    residual = matrix @ found.vector - found.values[0] * found.vector
    assert float(residual.norm()) == pytest.approx(found.errors[0], rel=1e-8)


def test_eigenvalues_that_have_converged_do_not_come_back() -> None:
    """As they do without reorthogonalisation."""
    matrix = with_eigenvalues([100.0, 50.0, *torch.linspace(0, 1, 98).tolist()], 8)
    found = found_in(matrix, 4, tolerance=1e-30, iterations=60)
    assert found.values[:2] == pytest.approx([100, 50], rel=1e-12)
    assert found.values[2:] == pytest.approx([1, 1 - 1 / 97], abs=1e-3)


def test_the_trace_within_its_standard_error() -> None:
    matrix = with_eigenvalues(torch.linspace(-1, 5, 40).tolist(), 2)
    mean, error = estimated_trace(matrix.mv, matrix[0], 400, seeded(0))
    off = matrix - torch.diag(matrix.diagonal())
    deviation = (2 * off.square().sum()).sqrt()  # of one sample of independent signs
    assert error == pytest.approx(float(deviation) / 20, rel=0.15)
    assert abs(mean - float(matrix.trace())) < 3 * error
    diagonal = torch.diag(matrix.diagonal())
    assert estimated_trace(diagonal.mv, matrix[0], 3, seeded(0)) == pytest.approx(
        (float(matrix.trace()), 0), abs=1e-12
    )
