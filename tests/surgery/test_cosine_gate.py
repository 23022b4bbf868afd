"""CosineGate alone; what holds of GSMorph, too, is in test_main_objective.py."""

import torch

import gradkit as gk
from surgery.rule_steps import step_with


def test_a_gate_admits_objectives_to_rules_that_follow():
    rows = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [1, 1, 0]]).double()
    rows = torch.cat([rows, torch.zeros(3, 7)], dim=1)
    direction, record = step_with(rows, gk.CosineGate(mode="unweighted"), gk.Mean())
    assert record.weights.tolist() == [0.5, 0.0, 0.5]
    torch.testing.assert_close(direction, (rows[0] + rows[2]) / 2)
