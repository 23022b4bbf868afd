"""Fixed weights."""

import pytest
import torch
from helpers import CONFLICT, Observed, as_users_run_it, seeded
from torchjd.aggregation import Constant as TorchjdConstant

import gradkit as gk
from surgery.rule_steps import step_with

ROWS = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)


def test_constant_weights():
    rule = gk.Constant([0.5, 2.0])
    assert rule(torch.tensor(CONFLICT)).tolist() == [10.0, 2.5, 2.5]
    assert rule.weights(torch.eye(2).expand(3, 4, 2, 2)).tolist() == [[[0.5, 2.0]] * 4] * 3
    theirs = TorchjdConstant(torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(gk.Constant((0.5, -2.0, 3.0))(ROWS), theirs(ROWS))


def test_constant_weights_by_name_in_a_step():
    rule = gk.Constant({"c": 3.0, "a": 0.5, "b": -2.0, "unused": 9.0})
    direction, record = step_with(ROWS, rule)
    torch.testing.assert_close(direction, 0.5 * ROWS[0] - 2 * ROWS[1] + 3 * ROWS[2])
    assert record.weights.tolist() == [0.5, -2.0, 3.0]
    # By position they go to the objectives that take part.
    direction, record = step_with(ROWS, Observed("b"), gk.Constant([0.5, 3.0]))
    torch.testing.assert_close(direction, 0.5 * ROWS[0] + 3 * ROWS[2])
    assert record.weights.tolist() == [0.5, 0.0, 3.0]


def test_rules_after_constant_weights_see_weighted_gradients():
    direction, _ = step_with(ROWS, gk.Constant([2.0, 0.0, 1.0]), gk.PCGrad(), gk.SAM())
    torch.testing.assert_close(direction, gk.PCGrad()(torch.stack([2 * ROWS[0], ROWS[2]])))


def test_constant_checks_its_argument():
    with as_users_run_it():
        for wrong in (None, "ab", torch.ones(2, 1), 1.0, [1.0, "x"], [True, 1.0]):
            with pytest.raises(TypeError, match="weights"):
                gk.Constant(wrong)
        with pytest.raises(ValueError, match="a number in weights is inf"):
            gk.Constant({"a": torch.inf})
    with pytest.raises(ValueError, match=r"2 numbers \(1.0, 2.0\) for 3 objectives \(0, 1, 2\)"):
        gk.Constant([1.0, 2.0])(ROWS)
    with pytest.raises(ValueError, match="no number for the objective 'b'"):
        step_with(ROWS, gk.Constant({"a": 1.0, "c": 1.0}))
