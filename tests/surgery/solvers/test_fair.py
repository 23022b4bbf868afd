"""The weights of fair bargaining."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradkit.surgery.solvers import fair_weights
from surgery.problems import GRAMS, gram

every = pytest.mark.parametrize("matrix", GRAMS.values(), ids=GRAMS.keys())


SOLVABLE = [
    "one", "two", "independent", "conflicting", "rank 1, one side", "equal", "all equal", "tiny",
    "huge", "mixed lengths", "nearly parallel", "many",
]  # fmt: skip


@pytest.mark.parametrize("name", SOLVABLE)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fair_weights_solve_their_equations(name: str, alpha: float) -> None:
    matrix = GRAMS[name]
    weights = fair_weights(matrix, alpha)
    assert (weights > 0).all()
    # Relative to the sums' largest terms, which cancel.
    terms = (matrix.abs() @ weights) * weights ** (1 / alpha)
    error = (matrix @ weights) * weights ** (1 / alpha) - 1
    assert float((error / terms).abs().max()) < 1e-13


def test_fair_weights_of_two() -> None:
    for cosine in [-0.999999, -0.5, 0.0, 0.7, 1.0]:
        lengths = torch.tensor([1e-4, 30.0], dtype=torch.float64)
        matrix = lengths.outer(lengths) * torch.tensor([[1.0, cosine], [cosine, 1.0]]).double()
        exact = matrix[0, 1] / lengths.prod()
        expected = 1 / (lengths * (1 + exact).sqrt())
        torch.testing.assert_close(fair_weights(matrix), expected, rtol=1e-9, atol=0)


@every
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fair_weights_are_finite_where_there_are_none(matrix: Tensor, alpha: float) -> None:
    weights = fair_weights(matrix, alpha)
    zero = matrix.diagonal() == 0
    assert weights.isfinite().all()
    assert (weights[zero] == 0).all()
    assert (weights[~zero] > 0).all()


def test_fair_weights_of_opposite_rows_cancel() -> None:
    matrix = gram(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).double())
    weights = fair_weights(matrix)
    torch.testing.assert_close(weights[1], 2 * weights[0], rtol=1e-5, atol=0)
    assert float(weights[1]) == pytest.approx(1e5, rel=1e-3)  # 1/√ε
    torch.testing.assert_close(weights[2], torch.ones(()).double())
    zero = fair_weights(GRAMS["a zero row"])
    torch.testing.assert_close(zero[:-1], fair_weights(GRAMS["independent"]))
    with pytest.raises(ValueError, match="alpha is 0"):
        fair_weights(matrix, 0.0)
