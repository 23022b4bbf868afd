"""FairGrad; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd

import gradkit as gk
from surgery.rule_steps import matrices


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation_as_torchjd_does(alpha):
    theirs = jd.FairGrad(alpha=alpha)
    for matrix in matrices()[:60]:
        if torch.linalg.matrix_rank(matrix) < len(matrix) or len(matrix) > 4:
            continue
        gram = matrix @ matrix.T
        weights = gk.FairGrad(alpha=alpha).weights(gram)
        torch.testing.assert_close(gram @ weights, weights ** (-1 / alpha), rtol=1e-8, atol=0)
        expected = theirs.gramian_weighting(gram)
        residual = (gram @ expected - expected ** (-1 / alpha)).abs().max()
        if float(residual) < 1e-6:  # scipy's least squares has arrived
            torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
