"""IMTL-G and ConFIG: equal, or chosen, projections on all gradients."""

import pytest
import torch
from helpers import CONFLICT, Observed, Weighted, as_users_run_it, jacobians, relative_error, seeded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchjd.aggregation import IMTLG as TorchjdIMTLG  # noqa: N811 # a class
from torchjd.aggregation import ConFIG as TorchjdConFIG

import gradkit as gk
from surgery.projections import config, imtlg
from surgery.rule_steps import check_resumes, directions, gradients, in_blocks, step_with

NAN = torch.nan
BOTH = [gk.IMTLG, gk.ConFIG]


def test_the_values_of_the_table():
    jacobian = torch.tensor(CONFLICT)
    for rule, expected in ((gk.IMTLG(), (0.0767, 1, 1)), (gk.ConFIG(), (0.1588, 2.0706, 2.0706))):
        for dtype in (torch.float32, torch.float64):
            assert rule(jacobian.to(dtype)).tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("rule", "reference"), [(gk.IMTLG(), imtlg), (gk.ConFIG(), config)])
def test_independent_gradients(rule, reference):
    jacobians = list(gradients(100, least=1))
    for jacobian, found in zip(jacobians, directions(rule, jacobians), strict=True):
        assert relative_error(found, reference(jacobian)) < 1e-8


def test_independent_gradients_equal_torchjds():
    jacobians = list(gradients(200))
    for rule, theirs in ((gk.IMTLG(), TorchjdIMTLG()), (gk.ConFIG(), TorchjdConFIG())):
        for jacobian, found in zip(jacobians, directions(rule, jacobians), strict=True):
            assert relative_error(found, theirs(jacobian)) < 1e-8
    preference = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    theirs = TorchjdConFIG(preference)
    jacobians = list(gradients(50, 3, 3))
    found = directions(gk.ConFIG(preference.tolist()), jacobians)
    for jacobian, ours in zip(jacobians, found, strict=True):
        assert relative_error(ours, theirs(jacobian)) < 1e-8


@settings(deadline=None, max_examples=30)
@given(
    jacobians(1, 5),
    st.lists(st.sampled_from([1e-6, 1.0, 1e6]), min_size=5, max_size=5),
    st.sampled_from(BOTH),
)
def test_the_line_does_not_depend_on_the_gradients_lengths(jacobian, factors, make):
    one = make()(jacobian)
    factors = torch.tensor(factors, dtype=torch.float64)[: len(jacobian), None]
    other = make()(factors * jacobian)
    assert one.isfinite().all()
    assert other.isfinite().all()
    assume(min(one.norm(), other.norm()) > 1e-9)
    cosine = torch.dot(one, other) / one.norm() / other.norm()
    assert abs(cosine.item()) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("make", BOTH)
def test_opposite_gradients_leave_nothing(make):
    first, second = torch.randn(2, 5, generator=seeded(0), dtype=torch.float64)
    two = torch.stack([first, -3 * first])
    four = torch.stack([first, -first, second, -second])
    assert make()(two).abs().max() < 1e-14
    assert make().weights(four @ four.T).tolist() == [0.0] * 4
    # A third, orthogonal gradient is all that is left beside two opposite ones.
    third = torch.tensor([[1.0, 0], [-1, 0], [0, 2]], dtype=torch.float64)
    torch.testing.assert_close(make()(third)[0], torch.tensor(0.0).double())


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_zero_gradients_have_no_weight(make, scale):
    for count in (2, 3, 4):
        jacobian = scale * torch.randn(count, 5, generator=seeded(count), dtype=torch.float64)
        jacobian[1] = 0
        weights = make().weights(jacobian @ jacobian.T)
        assert weights[1] == 0
        rest = jacobian[[k for k in range(count) if k != 1]]
        torch.testing.assert_close(weights @ jacobian, make()(rest), rtol=1e-9, atol=0)
    assert make().weights(torch.zeros(3, 3)).tolist() == [0.0] * 3
    assert make()(torch.zeros(2, 3)).tolist() == [0.0] * 3


def test_two_gradients_that_are_all_but_opposite():
    """The closed form has all digits where eigenvalues would have none."""
    angle = 1e-6
    jacobian = torch.tensor([[1.0, 0.0], [-2.0, 2 * angle]], dtype=torch.float64)
    torch.testing.assert_close(gk.IMTLG()(jacobian), imtlg(jacobian), rtol=1e-6, atol=1e-12)
    expected = config(jacobian, cutoff=1e-12)
    assert expected.norm() > 1e-6
    torch.testing.assert_close(gk.ConFIG()(jacobian), expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("make", BOTH)
def test_rounding_of_float32_gradients_does_not_count_as_a_direction(make):
    # Rounding leaves an eigenvalue of either sign; with these seeds it is positive twice.
    for seed in range(6):
        first, second = torch.randn(2, 20_000, generator=seeded(seed))
        dependent = torch.stack([first, second, 0.3 * first + 0.1 * second])
        exact = make()(dependent.double())
        assert relative_error(make()(dependent), exact) < 1e-3


@pytest.mark.parametrize("make", BOTH)
def test_nan_spoils_its_own_matrix_only(make):
    for count in (1, 2, 3):
        grams = torch.eye(count, dtype=torch.float64).repeat(3, 1, 1)
        grams[1, 0, count - 1] = NAN
        grams[2, 0, 0] = torch.inf
        weights = make().weigh_alone(grams)
        assert torch.equal(weights[0], make().weights(torch.eye(count).double()))
        assert weights[1:].isnan().all()


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_in_a_step(make, scope):
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    expected = in_blocks(rows[[0, 2]] * 2.0, scope, make())
    direction, _ = step_with(
        rows, Weighted(a=2.0, c=2.0), Observed("b"), make(scope=scope), gk.SAM()
    )
    torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize("make", BOTH)
def test_training_resumes(make):
    check_resumes(make)


def test_arguments_are_checked():
    with as_users_run_it():
        for make in BOTH:
            with pytest.raises(ValueError, match="scope is 'layer'"):
                make(scope="layer")
        with pytest.raises(ValueError, match=r"in preference is -1\.0; it must be at least 0"):
            gk.ConFIG([1.0, -1.0])
        with pytest.raises(TypeError, match=r"preference is 2\.0"):
            gk.ConFIG(2.0)
