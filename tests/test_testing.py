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
    with pytest.raises(AssertionError, match=r"saved after 0 steps and resumed: keep .*`state`"):
        gk.testing.check_optimizer_contract(
            lambda model: gk.wrap(
                torch.optim.SGD(model.parameters(), lr=0.1), Forgetful(), model=model
            )
        )


class NoDisplacement(gk.Transform):
    def around(self, inner, context):
        return lambda at=None, only=None: inner(None, only)


class SecondCallElsewhere(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            d = inner(at, only).direction()
            return inner(context.displaced(None, d, 0.1), only)

        return oracle


class WeightsForADisplacement(gk.Transform):
    def around(self, inner, context):
        return lambda at=None, only=None: inner(context.weights(at) * 1.1, only)


class OnlyElsewhere(gk.Transform):
    """Forgets where it is when it is asked for a part of the objectives."""

    def around(self, inner, context):
        return lambda at=None, only=None: inner(at if only is None else None, only)


class ByPosition(gk.Transform):
    """Expects all objectives each time."""

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.with_lr_scale(gradients.losses[1] / gradients.losses[1])

        return oracle


class NoArguments(gk.Transform):
    def around(self, inner, context):
        return lambda: inner()


class LastWord(gk.Transform):
    """Remembers those objectives that it was asked for last."""

    def __init__(self):
        self.state["names"] = []

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            context.propose(self, names=list(gradients.names))
            return gradients

        return oracle


class SilentUpdate(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.with_update(gradients.direction() / 2)

        return oracle


class SecretReader(gk.Transform):
    needs_rows = False

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.with_lr_scale(1 / (1 + gradients.rows[0].norm()))

        return oracle


class Writer(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            gradients.rows.mul_(0.5)
            return gradients

        return oracle


class Undeclared(gk.Transform):
    """Keeps a vector as if it were a number."""

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            context.propose(self, last=gradients.direction().clone())
            return gradients

        return oracle


WRONG: dict[type[gk.Transform], tuple[type[Exception], str]] = {
    NoDisplacement: (AssertionError, "NoDisplacement, asked at a displaced point, gives the grad"),
    SecondCallElsewhere: (AssertionError, "SecondCallElsewhere, asked at a displaced point"),
    WeightsForADisplacement: (AssertionError, "WeightsForADisplacement, .* not weights"),
    OnlyElsewhere: (AssertionError, "OnlyElsewhere, asked for objective 'a' only at a displaced"),
    ByPosition: (AssertionError, "asked for objective 'a' only, .*look them up in gradients.names"),
    NoArguments: (TypeError, "NoArguments.* takes 0 positional arguments"),
    LastWord: (AssertionError, "LastWord forgets the objective 'a'.* propose all of it each time"),
    SilentUpdate: (AssertionError, "SilentUpdate sets an update .* `sets_update = True`"),
    SecretReader: (AssertionError, "`needs_rows = False` and reads more than direction"),
    Writer: (AssertionError, r"Writer writes to gradients .*direction\(\).clone\(\)"),
    Undeclared: (ValueError, "Undeclared proposed a tensor 'last' of shape .*initial_vectors"),
}


# Where others need rows, it reads nothing that is not there.
ALONE = {SecretReader}


@pytest.mark.parametrize(
    ("wrong", "among_others"),
    [(wrong, flag) for wrong in WRONG for flag in (False, True) if not (flag and wrong in ALONE)],
)
def test_contract_finds_wrong_transforms(wrong: type[gk.Transform], among_others: bool) -> None:
    """And names the wrong one, wherever it is."""

    def make(model: nn.Module) -> gk.GradientOptimizer:
        chain = (gk.PCGrad(), wrong(), gk.SAM(rho=0.1)) if among_others else (wrong(),)
        return gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), *chain, model=model)

    error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        gk.testing.check_optimizer_contract(make, ("a", "b"))


class Towards(gk.Transform):
    """A pull towards the first weights: it depends on the weights themselves, and rightly."""

    sets_update = True

    def initial_vectors(self, layout):
        return {"start": layout.flatten(layout.local_parameters())}

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            away = context.weights(at) - self.vectors["start"]
            return gradients.with_update(gradients.direction() + away)

        return oracle


class Pair(gk.Transform):
    """Refuses to work on one objective."""

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.with_lr_scale(1 + gradients.cosine("a", "b"))

        return oracle


@pytest.mark.parametrize("sound", [Towards, Pair])
def test_contract_passes_what_depends_on_weights_or_refuses_one_objective(
    sound: type[gk.Transform],
) -> None:
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), sound(), model=model),
        ("a", "b"),
    )


def test_contract_says_where_classes_must_be_defined() -> None:
    class Local(gk.Transform):
        pass

    with pytest.raises(AssertionError, match=r"pickle fails: .*at the top of a module"):
        gk.testing.check_optimizer_contract(
            lambda model: gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), Local(), model=model)
        )


class Eager(gk.Transform):
    """Changes its state before the step is applied."""

    def __init__(self):
        self.state["calls"] = 0

    def around(self, inner, context):
        self.state["calls"] += 1
        return inner


def test_contract_says_how_state_changes() -> None:
    with pytest.raises(AssertionError, match=r"after KeyError in evaluation 1.*context\.propose"):
        gk.testing.check_optimizer_contract(
            lambda model: gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), Eager(), model=model)
        )
