"""Nash-MTL; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd

import gradkit as gk
from surgery.rule_steps import matrices


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
def test_nash_solves_its_equation_where_torchjd_only_comes_near():
    """TorchJD's sequence of convex programs stops early; its own residual is the larger."""
    compared = 0
    for matrix in matrices()[:40]:
        if torch.linalg.matrix_rank(matrix) < len(matrix):
            continue
        gram = matrix @ matrix.T
        weights = gk.NashMTL().weights(gram)
        residual = ((gram @ weights) * weights - 1).abs().max()
        assert float(residual) < 1e-9
        direction = gk.NashMTL(max_norm=1.0)(matrix)
        theirs = jd.NashMTL(n_tasks=len(matrix))(matrix)
        assert float(direction.norm()) == pytest.approx(1.0)
        # What the bargaining maximises, over all directions of this length.
        theirs = theirs / theirs.norm()
        if float((matrix @ theirs).min()) > 0:
            assert float((matrix @ direction).log().sum() - (matrix @ theirs).log().sum()) >= -1e-9
            compared += 1
    assert compared > 15
