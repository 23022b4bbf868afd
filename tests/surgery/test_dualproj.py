"""DualProj; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

import pytest

import gradkit as gk
from surgery.rule_steps import matrices


@pytest.mark.parametrize("rule", [gk.UPGrad, gk.DualProj])
def test_a_projection_conflicts_by_no_more_than_its_reg(rule):
    least = []
    for matrix in matrices():
        gram = matrix @ matrix.T
        for reg in (0.0, 1e-4, 1e-2):
            weights = rule(reg=reg).weights(gram)
            products = gram @ weights / gram.trace()
            assert float((products + reg * weights).min()) > -1e-9
            least.append(float(products.min()) / max(reg, 1e-9))
    assert min(least) < -0.1  # and the bound is not idle
