"""CosineGate and GSMorph: one main objective, the others auxiliary."""

import pytest
import torch
from helpers import CONFLICT, Observed, Weighted, as_users_run_it, jacobians, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkit as gk
from surgery.main_objective import gated, projected
from surgery.rule_steps import check_resumes, directions, gradients, in_blocks, step_with

MODES = ["weighted", "unweighted"]


def test_the_example_of_conflict():
    jacobian = torch.tensor(CONFLICT)
    for mode in MODES:
        assert gk.CosineGate(mode=mode)(jacobian).tolist() == list(CONFLICT[0])
        assert gk.CosineGate(1, mode=mode)(jacobian).tolist() == list(CONFLICT[1])
    weights = gk.GSMorph(scope="global").weights(jacobian @ jacobian.T)
    assert weights.tolist() == pytest.approx([1, 22 / 38])
    weights = gk.GSMorph(-1, scope="global").weights(jacobian @ jacobian.T)
    assert weights.tolist() == pytest.approx([22 / 18, 1])


@pytest.mark.parametrize("main", [0, 1, -1])
def test_both_rules_vector_by_vector(main):
    jacobians = list(gradients(200))
    for mode in MODES:
        found = directions(gk.CosineGate(main, mode), jacobians)
        for jacobian, direction in zip(jacobians, found, strict=True):
            assert relative_error(direction, gated(jacobian, main % len(jacobian), mode)) < 1e-12
    found = directions(gk.GSMorph(main, scope="global"), jacobians)
    for jacobian, direction in zip(jacobians, found, strict=True):
        assert relative_error(direction, projected(jacobian, main % len(jacobian))) < 1e-10


@settings(deadline=None, max_examples=30)
@given(jacobians(1, 5), st.sampled_from(MODES), st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_main_objective_comes_first(jacobian, mode, scale):
    main = jacobian[0].square().sum()
    slack = 1e-12 * (jacobian.square().sum() + 1)
    direction = gk.CosineGate(mode=mode)(scale * jacobian) / scale
    # To first order no step raises the main loss, and none lowers it less than alone.
    assert torch.dot(direction, jacobian[0]) >= main - slack
    direction = gk.GSMorph(scope="global")(scale * jacobian) / scale
    assert direction.isfinite().all()
    if len(jacobian) <= 2:
        assert (jacobian @ direction >= -slack).all()
        assert direction.square().sum() <= main + slack


def test_zero_gradients():
    jacobian = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert gk.GSMorph(scope="global")(jacobian).tolist() == [0.0, 2.0]
    for mode in MODES:
        assert gk.CosineGate(mode=mode)(jacobian).tolist() == [1.0, 2.0]
        # Beside a main gradient of 0 all cosines are 0.
        expected = [0.0, 0.0] if mode == "weighted" else [0.0, 2.0]
        assert gk.CosineGate(1, mode)(jacobian).tolist() == expected
    assert gk.GSMorph(1, scope="global")(jacobian).tolist() == [0.0, 0.0]
    assert gk.GSMorph(scope="global").weights(torch.eye(1)).tolist() == [1.0]
    assert gk.CosineGate().weights(torch.eye(1)).tolist() == [1.0]


RULES = [
    gk.CosineGate(1),
    gk.CosineGate(1, mode="unweighted"),
    gk.GSMorph(1, scope="global"),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_batches_dtypes_and_nan(rule):
    rows = torch.randn(2, 3, 4, 6, generator=seeded(0), dtype=torch.float64)
    grams = rows @ rows.mT
    grams[1, 2, 3, 0] = torch.nan
    weights = rule.weigh_alone(grams)
    assert weights[1, 2].isnan().all()
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        torch.testing.assert_close(weights[i, j], rule.weights(grams[i, j]))
    assert rule.weights(grams[0].float()).dtype == torch.float32


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_in_a_step_by_name(scope):
    rows = torch.randn(4, 10, generator=seeded(0), dtype=torch.float64)
    factors = {"a": 2.0, "c": 0.5, "d": 3.0}
    seen = torch.stack([rows[k] * factor for k, factor in ((0, 2.0), (2, 0.5), (3, 3.0))])
    inner = (Observed("b"), Weighted(**factors))
    direction, _ = step_with(rows, *inner, gk.CosineGate("c", scope=scope))
    torch.testing.assert_close(direction, in_blocks(seen, scope, lambda part: gated(part, 1)))
    direction, _ = step_with(rows, *inner, gk.GSMorph("c", scope=scope))
    torch.testing.assert_close(direction, in_blocks(seen, scope, lambda part: projected(part, 1)))


@pytest.mark.parametrize("make", [gk.CosineGate, gk.GSMorph])
def test_training_resumes(make):
    check_resumes(lambda: make("b"))


def test_arguments_are_checked():
    rows = torch.randn(2, 10, generator=seeded(0), dtype=torch.float64)
    for make in (gk.CosineGate, gk.GSMorph):
        with pytest.raises(ValueError, match="no objective 'main'; there are 'a', 'b'"):
            step_with(rows, make("main"))
        with pytest.raises(ValueError, match="no objective 'a'; there are 'b'"):
            step_with(rows, Observed("a"), make("a"))
        with pytest.raises(ValueError, match="no objective 2"):
            make(2, scope="global")(rows)
        with as_users_run_it():
            for wrong in (True, 1.0, None):
                with pytest.raises(TypeError, match=f"main is {wrong}; pass the main objective's"):
                    make(wrong)
            with pytest.raises(ValueError, match="scope is 'layer'"):
                make(scope="layer")
    with as_users_run_it(), pytest.raises(ValueError, match="mode is 'hard'; choose 'weighted'"):
        gk.CosineGate(mode="hard")
