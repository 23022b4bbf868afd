"""What PCD, CR-MOGM and MoDo have in common: rules that remember, in steps."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import as_users_run_it, linear_objectives
from torch import nn

import gradkit as gk
from surgery.rule_steps import series

BAD = [
    (lambda: gk.PCD(tau=1.5), "tau is 1.5; it must be between 0 and 1"),
    (lambda: gk.PCD(tau=[0.1, -0.1]), "a number in tau is -0.1; it must be between 0 and 1"),
    (lambda: gk.PCD(beta=1.0), "beta is 1.0; it must be at least 0 and less than 1"),
    (lambda: gk.PCD(eps=-1.0), "eps is -1.0; it must be at least 0"),
    (lambda: gk.MoDo(gamma=0.0), "gamma is 0.0; it must be positive"),
    (lambda: gk.MoDo(rho=-1.0), "rho is -1.0; it must be at least 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused(make, message):
    with as_users_run_it(), pytest.raises((TypeError, ValueError), match=message):
        make()


RULES = {
    "PCD": lambda scope: gk.PCD(scope=scope),
    "CRMOGM": lambda scope: gk.CRMOGM(gk.UPGrad(scope=scope)),
    "MoDo": lambda scope: gk.MoDo(scope=scope),
}


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", RULES)
def test_in_steps_they_do_what_they_do_alone(name, scope):
    """By tensor, each tensor has a memory of its own."""
    sizes = (3, 4)
    parameters = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    rule = RULES[name](scope)
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=1.0), rule)
    blocks = [slice(0, 3), slice(3, 7)] if scope == "tensor" else [slice(0, 7)]
    alone = [RULES[name]("global") for _ in blocks]
    for rows in series(3, steps=4, width=7):
        before = torch.cat([parameter.detach().clone() for parameter in parameters])
        optimizer.step(linear_objectives(parameters, rows))
        after = torch.cat([parameter.detach() for parameter in parameters])
        for block, twin in zip(blocks, alone, strict=True):
            torch.testing.assert_close((before - after)[block], twin(rows[:, block]))
        # In an optimizer only steps change what is remembered.
        state = copy.deepcopy(rule.state)
        rule.weights(torch.eye(3, dtype=torch.float64))
        assert str(state) == str(rule.state)
