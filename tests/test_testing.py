"""The optimizer contract finds what is wrong with an optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """Types of arguments are checked in the tests of each method."""
    with as_users_run_it():
        yield


BROKEN = {
    "keeps the learning rate": (
        "leaves the learning rate changed",
        lambda optimizer: optimizer.register_step_post_hook(
            lambda o, *_: o.param_groups[0].update(lr=0.5)
        ),
    ),
    "counts a batch twice": (
        "BatchNorm counted",
        lambda optimizer: optimizer.register_step_post_hook(
            lambda o, *_: o.model.norm.num_batches_tracked.add_(1)
        ),
    ),
    "writes a weight before closures run": (
        "weights and buffers differ after KeyError",
        lambda optimizer: optimizer.register_step_pre_hook(
            lambda o, *_: print(o.model.last.bias.data.add_(1.0))
        ),
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_contract_finds_faults(fault: str) -> None:
    message, break_it = BROKEN[fault]

    def make(model: nn.Module) -> gk.GradientOptimizer:
        optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        break_it(optimizer)
        return optimizer

    with pytest.raises(AssertionError, match=message):
        gk.testing.check_optimizer_contract(make)


class Forgetful(gk.Transform):
    """Keeps a number beside `state`, so that it is lost on resume."""

    def __init__(self) -> None:
        self.steps = 0

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(weights=gradients.weights / (1 + self.steps))

        return oracle

    def after_step(self, context):
        self.steps += 1


def test_contract_finds_state_that_is_not_saved() -> None:
    with pytest.raises(AssertionError, match="saved after 0 and resumed"):
        gk.testing.check_optimizer_contract(
            lambda model: gk.wrap(
                torch.optim.SGD(model.parameters(), lr=0.1), Forgetful(), model=model
            )
        )
