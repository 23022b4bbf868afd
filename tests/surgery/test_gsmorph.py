"""GSMorph alone; what holds of CosineGate, too, is in test_main_objective.py."""

import pytest
import torch
from helpers import seeded

import gradkit as gk
from surgery.main_objective import projected
from surgery.rule_steps import in_blocks, series, step_with


def test_several_auxiliary_gradients_are_projected_off_in_their_order():
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    direction = gk.GSMorph(scope="global")(jacobian)
    torch.testing.assert_close(direction, projected(jacobian))
    other = gk.GSMorph(scope="global")(jacobian[[0, 2, 1]])
    assert not torch.allclose(direction, other)
    # The last one is in no conflict with the result; the first may be again.
    assert torch.dot(direction, jacobian[2]) >= -1e-15
    assert torch.dot(direction, jacobian[1]) < -0.1


def test_over_all_parameters_it_is_a_gem():
    conflicts = 0
    for g, r in series(2, steps=8, width=10):
        expected = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
        conflicts += bool(g @ r < 0)
        direction, _ = step_with(torch.stack([g, r]), gk.GSMorph(scope="global"))
        torch.testing.assert_close(direction, expected, rtol=1e-12, atol=1e-12)
    assert 0 < conflicts < 8


def test_gsmorph_works_by_tensor_unless_told_otherwise():
    rows = torch.randn(2, 10, generator=seeded(3), dtype=torch.float64)
    direction, _ = step_with(rows, gk.GSMorph(), gk.SAM())
    torch.testing.assert_close(direction, in_blocks(rows, "tensor", projected))
    with pytest.raises(ValueError, match="works by tensor, and a bare matrix"):
        gk.GSMorph()(rows)
