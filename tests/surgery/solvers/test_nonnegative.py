"""Quadratic programs over the nonnegative orthant."""

from __future__ import annotations

import pytest
import torch
from helpers import jacobians
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradkit.surgery.solvers import nonnegative_minimum
from surgery.problems import gram, least_on_orthant, normal

quick = settings(max_examples=40, deadline=None)


@quick
@given(jacobians(maximum=5), st.integers(0, 2**31))
def test_nonnegative_minimum_equals_the_best_of_all_supports(rows: Tensor, seed: int) -> None:
    matrix = gram(rows)
    linear = rows @ normal(rows.shape[1], seed=seed)  # in the range of G
    point, bounded = nonnegative_minimum(matrix, linear)
    value = float(point @ matrix @ point / 2 + linear @ point)
    assert bounded
    assert value == pytest.approx(least_on_orthant(matrix.numpy(), linear.numpy()), abs=1e-9)


def test_nonnegative_minimum_knows_where_there_is_none() -> None:
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    flat = torch.zeros(1, 1, dtype=torch.float64)
    for matrix, linear, expected in [
        (opposite, [1.0, -1.0], True),
        (opposite, [1.0, -1.0 - 1e-5], False),
        (opposite, [1.0, -1.0 + 1e-5], True),
        (flat, [-1e-9], False),
        (flat, [0.0], True),
        (flat, [1.0], True),
        (1e-9 * torch.eye(2).double(), [-1.0, 2.0], True),
    ]:
        point, bounded = nonnegative_minimum(matrix, torch.tensor(linear).double())
        assert bool(bounded) is expected
        assert point.isfinite().all()
