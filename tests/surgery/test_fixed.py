"""Sum and mean."""

import pytest
import torch
from helpers import (
    seeded,
)

import gradkit as gk
from surgery.rule_steps import step_with


@pytest.mark.parametrize("count", [1, 3, 5])
def test_sum_and_mean(count):
    jacobian = torch.randn(count, 4, generator=seeded(0), dtype=torch.float64)
    torch.testing.assert_close(gk.Sum()(jacobian), jacobian.sum(0))
    torch.testing.assert_close(gk.Mean()(jacobian), jacobian.mean(0))
    gram = jacobian @ jacobian.T
    assert gk.Sum().weights(gram).tolist() == [1.0] * count
    assert gk.Mean().weights(gram).tolist() == pytest.approx([1 / count] * count)
    assert gk.Mean().weights(gram.expand(2, 3, -1, -1)).shape == (2, 3, count)


@pytest.mark.parametrize("rule", [gk.Sum(), gk.Mean()], ids=repr)
def test_fixed_rules_in_a_step(rule):
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    direction, record = step_with(rows, rule)
    torch.testing.assert_close(direction, rule(rows))
    torch.testing.assert_close(record.weights, rule.weights(rows @ rows.T))
