import pytest
import torch
from helpers import CONFLICT, Observed, as_users_run_it, jacobians, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import Krum as TorchjdKrum

import gradkit as gk
from surgery.rule_steps import check_resumes, in_blocks, step_with


def selected(jacobian, f=0, m=1, power=2):
    """The gradients of least score, vector by vector; the first of equal ones."""
    count = len(jacobian)
    scores = []
    for i, gradient in enumerate(jacobian):
        distances = sorted(
            float((gradient - other).norm()) ** power for j, other in enumerate(jacobian) if j != i
        )
        scores.append(sum(distances[: max(count - f - 2, 1)]))
    return sorted(sorted(range(count), key=lambda i: scores[i])[:m])


def krum(jacobian, f=0, m=1):
    return jacobian[selected(jacobian, f, m)].mean(0)


def cases(number=200):
    generator = seeded(0)
    for index in range(number):
        count, f = 4 + index % 5, index % 2
        rows = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        if index % 3 == 0:
            rows[:f] += 50
        if index % 3 == 1:
            rows *= torch.rand(count, 1, generator=generator, dtype=torch.float64)
        yield rows, f, 1 + index % 3


def test_krum_vector_by_vector():
    for jacobian, f, m in cases():
        weights = gk.Krum(n_byzantine=f, n_selected=m).weights(jacobian @ jacobian.T)
        assert weights.nonzero().flatten().tolist() == selected(jacobian, f, m)
        torch.testing.assert_close(weights @ jacobian, krum(jacobian, f, m))


def test_krum_equals_torchjds_where_distances_select_as_their_squares_do():
    agreeing = 0
    for jacobian, f, m in cases():
        if selected(jacobian, f, m) == selected(jacobian, f, m, power=1):
            agreeing += 1
            theirs = TorchjdKrum(n_byzantine=f, n_selected=m)
            torch.testing.assert_close(gk.Krum(f, m)(jacobian), theirs(jacobian))
    assert 100 < agreeing < 200


def test_squares_as_in_the_paper():
    """Of neighbours at 0 and 3 or at 2 and 2 the second pair is nearer by squares only."""
    jacobian = torch.tensor([[0.0], [0.0], [3.0], [9.0], [11.0], [13.0]], dtype=torch.float64)
    assert selected(jacobian, f=2) == [4]
    assert selected(jacobian, f=2, power=1) == [0]
    assert gk.Krum(n_byzantine=2)(jacobian).tolist() == [11.0]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(3, 6),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_strangers_are_not_selected(honest, strangers, seed, scale):
    count = honest + strangers
    if count < 2 * strangers + 3:
        return
    generator = seeded(seed)
    rows = torch.ones(count, 4).double()
    rows += 0.1 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    rows[:strangers] *= 100
    weights = gk.Krum(strangers).weights((scale * rows) @ (scale * rows).T)
    assert not weights[:strangers].any()
    assert weights.sum() == 1


@settings(deadline=None, max_examples=30)
@given(jacobians(1, 6), st.integers(0, 6))
def test_one_of_any_gradients_is_selected(jacobian, f):
    weights = gk.Krum(n_byzantine=f).weights(jacobian @ jacobian.T)
    assert sorted(weights.tolist()) == [0.0] * (len(jacobian) - 1) + [1.0]


def test_few_gradients():
    jacobian = torch.tensor(CONFLICT, dtype=torch.float64)
    assert gk.Krum()(jacobian[:1]).tolist() == list(CONFLICT[0])
    assert gk.Krum()(jacobian).tolist() == list(CONFLICT[0])
    assert gk.Krum(n_selected=2)(jacobian).tolist() == [1.0, 1.0, 1.0]
    # One neighbour is left: the pair that is nearest wins.
    three = torch.tensor([[0.0, 9.0], [1.0, 0.0], [1.5, 0.0]], dtype=torch.float64)
    assert gk.Krum(n_byzantine=5)(three).tolist() == [1.0, 0.0]


def test_batches_dtypes_and_nan():
    rows = torch.randn(2, 3, 5, 6, generator=seeded(0), dtype=torch.float64)
    grams = rows @ rows.mT
    grams[1, 2, 3, 0] = torch.nan
    rule = gk.Krum(n_byzantine=1, n_selected=2)
    weights = rule.weigh_alone(grams)
    assert weights[1, 2].isnan().all()
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        assert torch.equal(weights[i, j], rule.weights(grams[i, j]))
    assert rule.weights(grams[0].float()).dtype == torch.float32


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_in_a_step(scope):
    rows = torch.randn(6, 10, generator=seeded(0), dtype=torch.float64)
    seen = rows[[0, 1, 3, 4, 5]]
    expected = in_blocks(seen, scope, lambda part: krum(part, 1, 2))
    rule = gk.Krum(n_byzantine=1, n_selected=2, scope=scope)
    direction, _ = step_with(rows, Observed("c"), rule, gk.SAM())
    torch.testing.assert_close(direction, expected)


def test_training_resumes():
    check_resumes(gk.Krum)


def test_arguments_are_checked():
    with as_users_run_it():
        with pytest.raises(ValueError, match="n_byzantine is -1; it must be at least 0"):
            gk.Krum(n_byzantine=-1)
        with pytest.raises(ValueError, match="n_selected is 0; it must be at least 1"):
            gk.Krum(n_selected=0)
        for wrong in (1.0, True, "1"):
            with pytest.raises(TypeError, match=r"n_selected is .*; pass a whole number"):
                gk.Krum(n_selected=wrong)
        with pytest.raises(ValueError, match="scope is 'layer'"):
            gk.Krum(scope="layer")
    with pytest.raises(ValueError, match="n_selected is 3, but there are 2 gradients; pass at mos"):
        gk.Krum(n_selected=3)(torch.tensor(CONFLICT))
