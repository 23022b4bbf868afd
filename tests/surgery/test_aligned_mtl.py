import numpy as np
import pytest
import torch
from helpers import CONFLICT, Observed, as_users_run_it, jacobians, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import AlignedMTL as TorchjdAlignedMTL

import gradkit as gk
from surgery.rule_steps import (
    check_resumes,
    dependent_gradients,
    directions,
    gradients,
    in_blocks,
    independent_gradients,
    step_with,
)

MODES = ["min", "median", "rmse"]


def aligned(jacobian, preference=None, mode="min"):
    """By the singular values of the gradients: B·J = √s·U·Vᵀ over those that are not 0."""
    count = len(jacobian)
    preference = np.full(count, 1 / count) if preference is None else np.asarray(preference)
    left, values, right = np.linalg.svd(jacobian.numpy(), full_matrices=False)
    kept = values > 1e-7 * values.max()
    if not kept.any():
        return torch.zeros_like(jacobian[0])
    left, values, right = left[:, kept], values[kept], right[kept]
    square = {
        "min": np.min(values**2),
        "median": np.sort(values**2)[(len(values) - 1) // 2],
        "rmse": np.mean(values**2),
    }[mode]
    return torch.from_numpy(np.sqrt(square) * (preference @ left) @ right)


def test_the_value_of_the_table():
    jacobian = torch.tensor(CONFLICT)
    for dtype in (torch.float32, torch.float64):
        direction = gk.AlignedMTL()(jacobian.to(dtype))
        assert direction.tolist() == pytest.approx((0.2133, 0.9673, 0.9673), abs=5e-5)


@pytest.mark.parametrize("mode", MODES)
def test_aligned_mtl_by_singular_values_and_torchjds(mode):
    rule, theirs = gk.AlignedMTL(scale_mode=mode), TorchjdAlignedMTL(scale_mode=mode)
    jacobians = [*gradients(120, least=1), *dependent_gradients(80)]
    for jacobian, direction in zip(jacobians, directions(rule, jacobians), strict=True):
        assert relative_error(direction, aligned(jacobian, mode=mode)) < 1e-6
        assert relative_error(direction, theirs(jacobian)) < 1e-6


def test_a_preference():
    preference = [1.0, 0.0, 2.5]
    theirs = TorchjdAlignedMTL(torch.tensor(preference, dtype=torch.float64))
    jacobians = list(gradients(40, 3, 3))
    found = directions(gk.AlignedMTL(preference), jacobians)
    for jacobian, direction in zip(jacobians, found, strict=True):
        assert relative_error(direction, aligned(jacobian, preference)) < 1e-6
        assert relative_error(direction, theirs(jacobian)) < 1e-6


@settings(deadline=None, max_examples=30)
@given(independent_gradients(), st.sampled_from(MODES))
def test_aligned_gradients_are_orthogonal_and_equally_long(jacobian, mode):
    values = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    count = len(jacobian)
    # A preference for one objective alone gives its aligned gradient.
    rows = torch.stack(
        [gk.AlignedMTL(row.tolist(), scale_mode=mode)(jacobian) for row in torch.eye(count)]
    )
    square = {"min": values[0], "median": values[(count - 1) // 2], "rmse": values.mean()}[mode]
    torch.testing.assert_close(rows @ rows.T, square * torch.eye(count).double())
    # Aligning moves no gradient to its other side.
    assert ((rows * jacobian).sum(1) > 0).all()


@settings(deadline=None, max_examples=30)
@given(jacobians(1, 6), st.sampled_from([1e-12, 1e-3, 1e12]), st.sampled_from(MODES))
def test_any_gradients_give_finite_directions_at_every_scale(jacobian, scale, mode):
    rule = gk.AlignedMTL(scale_mode=mode)
    direction = rule(jacobian)
    assert direction.isfinite().all()
    torch.testing.assert_close(rule(scale * jacobian) / scale, direction, rtol=1e-5, atol=1e-5)


def test_lengths_do_not_make_gradients_dependent():
    """Orthogonal gradients of very different lengths: all are brought down to the shortest."""
    lengths = torch.tensor([1e-6, 1.0, 10.0], dtype=torch.float64)
    direction = gk.AlignedMTL([1.0, 1.0, 1.0])(torch.diag(lengths))
    assert direction.tolist() == pytest.approx([1e-6] * 3, rel=1e-3)
    # Beyond what double precision can tell, the short one is left out.
    lengths[0] = 1e-12
    direction = gk.AlignedMTL([1.0, 1.0, 1.0])(torch.diag(lengths))
    assert direction.tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-9)


def test_rounding_of_float32_gradients_does_not_set_the_scale():
    first, second = torch.randn(2, 50_000, generator=seeded(0))
    dependent = torch.stack([first, second, first + second])
    expected = aligned(dependent.double())
    assert expected.norm() > 10
    assert relative_error(gk.AlignedMTL()(dependent), expected) < 1e-3


def test_zero_gradients():
    jacobian = torch.randn(3, 5, generator=seeded(0), dtype=torch.float64)
    jacobian[1] = 0
    weights = gk.AlignedMTL().weights(jacobian @ jacobian.T)
    assert abs(weights[1]) < 1e-14
    rest = gk.AlignedMTL([1 / 3, 1 / 3])(jacobian[[0, 2]])
    torch.testing.assert_close(weights @ jacobian, rest)
    assert gk.AlignedMTL([2.0, 1.0]).weights(torch.zeros(2, 2)).tolist() == [2.0, 1.0]
    assert gk.AlignedMTL().weights(torch.tensor([[9.0]])).tolist() == [1.0]


def test_batches_and_nan():
    rows = torch.randn(2, 3, 4, 6, generator=seeded(0), dtype=torch.float64)
    rows[0, 1, 2] = rows[0, 1, 3]  # of different ranks
    rows[1, 0] = 0
    grams = rows @ rows.mT
    grams[1, 2, 0, 1] = torch.nan
    weights = gk.AlignedMTL(scale_mode="median").weigh_alone(grams)
    assert weights[1, 2].isnan().all()
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        expected = gk.AlignedMTL(scale_mode="median").weights(grams[i, j])
        torch.testing.assert_close(weights[i, j], expected)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_in_a_step(scope):
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    preference = {"a": 1.0, "b": 0.5, "c": 2.0}
    expected = in_blocks(rows, scope, lambda part: aligned(part, list(preference.values())))
    rule = gk.AlignedMTL(preference, scope=scope)
    direction, _ = step_with(rows, rule, gk.SAM())
    torch.testing.assert_close(direction, expected)
    expected = in_blocks(rows[1:], scope, lambda part: aligned(part, [0.5, 2.0]))
    direction, _ = step_with(rows, Observed("a"), gk.AlignedMTL(preference, scope=scope))
    torch.testing.assert_close(direction, expected)


def test_training_resumes():
    check_resumes(gk.AlignedMTL)


def test_arguments_are_checked():
    with as_users_run_it():
        with pytest.raises(ValueError, match="scale_mode is 'max'; choose 'min', 'median' or 'rm"):
            gk.AlignedMTL(scale_mode="max")
        with pytest.raises(ValueError, match="a number in preference is nan"):
            gk.AlignedMTL([1.0, torch.nan])
        with pytest.raises(ValueError, match="scope is 'layer'"):
            gk.AlignedMTL(scope="layer")
