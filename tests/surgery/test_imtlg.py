"""IMTL-G alone; what holds of ConFIG, too, is in test_imtlg_and_config.py."""

import numpy as np
import pytest
import torch
from helpers import relative_error, seeded
from hypothesis import assume, given, settings
from torchjd.aggregation import IMTLG as TorchjdIMTLG  # noqa: N811 # a class

import gradkit as gk
from surgery.projections import imtlg, units
from surgery.rule_steps import independent_gradients


def test_imtlg_of_parallel_gradients_is_the_limit_of_independent_ones():
    base = torch.randn(2, 6, generator=seeded(0), dtype=torch.float64)
    parallel = torch.stack([base[0], 2.5 * base[0]])
    near = parallel + 1e-6 * torch.randn(2, 6, generator=seeded(1), dtype=torch.float64)
    expected = gk.IMTLG()(near)
    torch.testing.assert_close(gk.IMTLG()(parallel), expected, rtol=1e-5, atol=1e-5)
    # Beside a third one, too, by the pseudo-inverse of the cosines; TorchJD's differs.
    three = torch.cat([parallel, base[1:]])
    unit = units(three).numpy()
    solution = np.linalg.pinv(unit @ unit.T, rcond=1e-9).sum(1) / three.norm(dim=1).numpy()
    expected = torch.from_numpy(solution / solution.sum() @ three.numpy())
    assert relative_error(gk.IMTLG()(three), expected) < 1e-10
    assert relative_error(TorchjdIMTLG()(three), expected) > 0.01
    projections = units(three) @ gk.IMTLG()(three)
    torch.testing.assert_close(projections, projections[0].expand(3))


def test_imtlg_may_turn_against_all():
    """What its docstring warns of: the sum that the weights are divided by is negative."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 3.0, 0.1]], dtype=torch.float64)
    rows = units(rows) * torch.tensor([[1.0], [0.01], [1.0]], dtype=torch.float64)
    direction = gk.IMTLG()(rows)
    torch.testing.assert_close(direction, imtlg(rows))
    assert (rows @ direction < 0).all()
    assert (rows @ gk.ConFIG()(rows) > 0).all()


@settings(deadline=None, max_examples=30)
@given(independent_gradients())
def test_projections_are_equal_and_weights_sum_to_one(jacobian):
    weights = gk.IMTLG().weights(jacobian @ jacobian.T)
    assume(weights.abs().max() < 1e4)
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    projections = units(jacobian) @ (weights @ jacobian)
    torch.testing.assert_close(projections, projections[0].expand(len(jacobian)))
