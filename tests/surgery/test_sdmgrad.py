"""SDMGrad; what holds of other rules, too, is in test_solver_rules.py."""

from __future__ import annotations

import torch
from helpers import relative_error

import gradkit as gk
from surgery.rule_steps import matrices


def test_sdmgrad_between_its_ends_and_by_a_search():
    matrix = matrices()[8]
    torch.testing.assert_close(gk.SDMGrad(lambda_=0.0)(matrix), gk.MGDA()(matrix))
    far = gk.SDMGrad(lambda_=1e6)(matrix)
    torch.testing.assert_close(far, matrix.mean(0), rtol=1e-4, atol=1e-4)
    target = 0.3 * matrix.mean(0)
    logits = torch.zeros(len(matrix), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def length():
        search.zero_grad()
        loss = (logits.softmax(0) @ matrix + target).square().sum()
        loss.backward()
        return loss

    search.step(length)
    found = (logits.detach().softmax(0) @ matrix + target) / 1.3
    ours = gk.SDMGrad()(matrix)
    assert float((1.3 * ours).square().sum()) <= float((1.3 * found).square().sum()) + 1e-12
    assert relative_error(ours, found) < 1e-4
