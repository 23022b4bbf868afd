"""DualProj; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import gradkit as gk
from surgery.rule_steps import gradients, matrices, step_with


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


def episodic_memory(rows: torch.Tensor) -> torch.Tensor:
    """GEM's direction: the nearest to the first gradient that conflicts with no other.

    By trying all sets of constraints that may be active.
    """
    g, earlier = rows[0], rows[1:]
    found = []
    for count in range(len(earlier) + 1):
        for active in combinations(range(len(earlier)), count):
            chosen = earlier[list(active)]
            d = g - chosen.T @ torch.linalg.solve(chosen @ chosen.T, chosen @ g)
            if bool((earlier @ d >= -1e-10 * rows.norm() ** 2).all()):
                found.append(d)
    return min(found, key=lambda d: float((d - g).norm()))


def test_with_a_preference_for_the_new_task_it_is_gradient_episodic_memory():
    rule, changed = gk.DualProj([1.0, 0.0, 0.0, 0.0], reg=0.0), 0
    for rows in gradients(24, least=4, most=4):
        rows = torch.cat([rows / rows.norm(), torch.zeros(4, 2, dtype=torch.float64)], dim=1)
        expected = episodic_memory(rows)
        changed += not torch.equal(expected, rows[0])
        direction, _ = step_with(rows, rule)
        torch.testing.assert_close(direction, expected, rtol=1e-8, atol=1e-9)
    assert 0 < changed < 24
