from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch
from helpers import jacobians
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from gradkit.surgery.solvers import (
    active_set,
    conflict_averse,
    fair_weights,
    least_distance,
    nonnegative_minimum,
    prepared,
    project_onto_dual_cone,
    project_onto_simplex,
    simplex_minimum,
)
from surgery.problems import (
    EXAMPLE,
    GRAMS,
    allowance,
    gram,
    least_on_orthant,
    least_on_simplex,
    normal,
)

quick = settings(max_examples=40, deadline=None)
every = pytest.mark.parametrize("matrix", GRAMS.values(), ids=GRAMS.keys())


# Over the simplex


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


# CAGrad


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


# Over the orthant


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


# Fairness


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


# All of them


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


def test_the_primal_method_alone_finds_the_same() -> None:
    """It finishes what block pivoting does not."""
    for name in ["conflicting", "dependent", "mixed lengths", "many"]:
        matrix = GRAMS[name]
        cosines, lengths, _ = prepared.prepare(matrix[None])
        linear = -normal(1, len(matrix), seed=12).abs() * lengths
        for problem in [
            active_set.over_simplex(cosines, -linear, 1 / lengths),
            active_set.Quadratic(cosines + 0.01 * torch.eye(len(matrix)), linear),
        ]:
            start = torch.ones_like(lengths)
            expected, _, _ = active_set.minimise(problem, start > 0)
            centre = torch.zeros_like(start)
            found, _ = active_set._primal(problem, start, centre)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
