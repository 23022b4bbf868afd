"""What a rule of a user's own is told when it returns something else than weights."""

import pytest
import torch
from helpers import as_users_run_it
from torchjd import aggregation

import gradkit as gk
from gradkit.surgery import GramRule
from surgery.rule_steps import step_with

ROWS = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Own(GramRule):
    """Returns what it is told to, of the Gram matrix."""

    def __init__(self, function, scope="global"):
        self.function = function
        self.scope = scope

    def weigh(self, inputs, memory):
        return self.function(inputs, memory)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda inputs, memory: (torch.ones(1).double(), memory), r"\(1,\)"),
        (lambda inputs, memory: (inputs.gram, memory), r"\(3, 3\)"),
        (lambda inputs, memory: ([1.0, 1.0, 1.0], memory), "list"),
        (lambda inputs, memory: (None, memory), "NoneType"),
        (lambda inputs, memory: torch.ones(3).double(), r"\(3,\) alone"),
        (lambda inputs, memory: (torch.ones(3).double(), None), "tuple alone"),
    ],
)
def test_weights_are_checked(function, what):
    with as_users_run_it():
        with pytest.raises(ValueError, match=rf"returned {what} for .*shape \(3,\)"):
            step_with(ROWS, Own(function))
        with pytest.raises(ValueError, match=rf"returned {what} for .*shape \(3,\)"):
            Own(function)(ROWS)


def test_a_scope_is_checked_whenever_it_is_set():
    rule = Own(None)
    with as_users_run_it(), pytest.raises(ValueError, match="scope is 'layer'; choose one of glo"):
        rule.scope = "layer"
    assert rule.scope == "global"


def test_batches_are_not_to_be_forgotten():
    rule = Own(lambda inputs, memory: (inputs.gram.new_ones(3), memory), scope="tensor")
    with as_users_run_it(), pytest.raises(ValueError, match=r"a tensor of shape \(4, 3\)"):
        step_with(ROWS, rule)


def test_what_is_remembered_must_be_named():
    def function(inputs, memory):
        return torch.ones_like(inputs.gram[0]), {"lengths": inputs.gram.diagonal()}

    for use in (lambda rule: step_with(ROWS, rule), lambda rule: rule(ROWS)):
        with pytest.raises(ValueError, match="remembers 'lengths', which its init"):
            use(Own(function))


def test_losses_must_be_asked_for():
    rule = Own(lambda inputs, memory: (inputs.needed_losses(rule), memory))
    with pytest.raises(ValueError, match=r"in gk\.wrap\(\) .* if its needs_losses is True"):
        step_with(ROWS, rule)


@pytest.mark.parametrize(
    "make",
    [
        lambda: aggregation.SDMGradWeighting(),
        lambda: aggregation.MoDoWeighting(),
        lambda: aggregation.CRMOGMWeighting(aggregation.MGDAWeighting()),
    ],
    ids=["SDMGrad", "MoDo", "CRMOGM"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchjds_other_weightings_of_products_are_known(make):
    rule = gk.Aggregate(make())
    assert rule.works_on == "gram"
    direction, _ = step_with(ROWS, rule)
    expected = make()(ROWS @ ROWS.T) @ ROWS
    torch.testing.assert_close(direction, expected.detach())


def test_a_weighting_of_gradients_inside_crmogm_is_one_of_gradients():
    weighting = aggregation.CRMOGMWeighting(aggregation.MeanWeighting())
    assert gk.Aggregate(weighting).works_on == "rows"
