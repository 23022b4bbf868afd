"""CR-MOGM, around several rules."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd
from helpers import as_users_run_it, relative_error, seeded

import gradkit as gk
from surgery.rule_steps import series


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_cr_mogm_averages_as_torchjds_does(alpha):
    ours = gk.CRMOGM(gk.UPGrad(), alpha=alpha)
    peer = jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.UPGradWeighting(), alpha=alpha))
    for matrix in series(4):
        assert relative_error(ours(matrix), peer(matrix)) < 1e-6


def test_cr_mogm_keeps_the_memory_of_the_rule_inside():
    class Counts(gk.surgery.GramRule):
        def init(self, count):
            return {"steps": torch.zeros(count)}

        def weigh(self, inputs, memory):
            steps = memory["steps"] + 1
            return steps, {"steps": steps}

    rule = gk.CRMOGM(Counts(), alpha=0.5)
    gram = torch.eye(2, dtype=torch.float64)
    assert [rule.weights(gram)[0].item() for _ in range(3)] == [1.0, 1.5, 2.25]
    rule.reset()
    assert rule.weights(gram)[0].item() == 1.0


def test_cr_mogm_passes_on_what_the_rule_inside_needs():
    order = gk.CRMOGM(gk.PCGrad(generator=seeded(7)), alpha=0.0)
    matrix = series(5)[0]
    torch.testing.assert_close(order(matrix), gk.PCGrad(generator=seeded(7))(matrix))
    losses = torch.linspace(1, 2, 5, dtype=torch.float64)
    inside = gk.MGDA(normalization="loss")
    torch.testing.assert_close(gk.CRMOGM(inside)(matrix, losses), inside(matrix, losses))
    assert gk.CRMOGM(gk.MGDA(scope="tensor")).sets_update
    with as_users_run_it():
        with pytest.raises(TypeError, match="rule is a str; pass a rule by"):
            gk.CRMOGM("mgda")
        with pytest.raises(ValueError, match="alpha is 2; it must be between 0 and 1"):
            gk.CRMOGM(alpha=2)


def test_cr_mogm_checks_the_weights_of_the_rule_inside():
    class Wrong(gk.surgery.GramRule):
        def weigh(self, inputs, memory):
            return inputs.gram, memory

    message = r"weigh\(\) of .*Wrong.* returned \(2, 2\) for Gram"
    with as_users_run_it(), pytest.raises(ValueError, match=message):
        gk.CRMOGM(Wrong()).weights(torch.eye(2))
