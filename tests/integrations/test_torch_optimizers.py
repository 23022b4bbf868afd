"""Every optimizer of torch, in every setting it has, steps wrapped as it does bare."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import gradkit as gk
from integrations.references import Batch, data, error, network

REFUSED = {"LBFGS", "SparseAdam"}
CLASSES = {
    name: item
    for name, item in vars(torch.optim).items()
    if isinstance(item, type) and issubclass(item, Optimizer) and item is not Optimizer
}
# What arguments are set to, where a constructor has them; the first four in each way of computing.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": torch.tensor(0.02)},
    {"maximize": True, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"lr": 0.02},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "centered": True},
    {"amsgrad": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"initial_accumulator_value": 0.1, "lr_decay": 0.5},
    {"betas": (0.5, 0.7), "eps": 1e-4},
    {"rho": 0.6},
    {"lambd": 0.1, "t0": 1.0},
    {"momentum_decay": 0.01},
    {"beta2_decay": -1.0, "d": 1.5},
    {"etas": (0.7, 1.3), "step_sizes": (1e-3, 1.0)},
    {"ns_steps": 2, "adjust_lr_fn": "match_rms_adamw"},
]
WAYS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
BATCHES = data(4)


def configurations(kind: type[Optimizer]) -> Iterator[dict[str, Any]]:
    """Each setting the class has, and the first ones in each way of computing, too."""
    known = inspect.signature(kind).parameters
    settings = [setting for setting in SETTINGS if setting.keys() <= known.keys()]
    for number, setting in enumerate(settings):
        for way in WAYS if number < 4 else WAYS[:1]:
            if way.keys() <= known.keys():
                yield copy.deepcopy({**setting, **way})


def run(
    net: nn.Module, make: Callable[[], Optimizer], closure: Callable[[Optimizer, Batch], Tensor]
) -> dict[str, Any]:
    """Steps with and without a closure; from the middle on by an optimizer that was loaded."""
    optimizer = make()
    scheduler = ExponentialLR(optimizer, gamma=0.5)
    for number, batch in enumerate(BATCHES):
        if number == 2:
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer = make()
            scheduler = ExponentialLR(optimizer, gamma=0.5)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        if number % 2:
            optimizer.zero_grad()
            error(net, batch).backward()
            optimizer.step()
        else:
            optimizer.step(lambda: closure(optimizer, batch))
        scheduler.step()
    return optimizer.state_dict()


def bare_run(kind: type[Optimizer], options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    net = network()

    def closure(optimizer: Optimizer, batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = error(net, batch)
        loss.backward()
        return loss

    return net, run(net, lambda: kind(optimised(net, kind), **copy.deepcopy(options)), closure)


def wrapped_run(kind: type[Optimizer], options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    net = network()
    return net, run(
        net,
        lambda: gk.wrap(kind(optimised(net, kind), **copy.deepcopy(options)), model=net),
        lambda optimizer, batch: error(net, batch),
    )


def optimised(net: nn.Module, kind: type[Optimizer]) -> list[Tensor]:
    matrices = kind.__name__ == "Muon"
    return [p for p in net.parameters() if not matrices or p.dim() == 2]


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}: {key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}: {number}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - REFUSED))
def test_it_equals_the_bare_optimizer_in_every_setting(name: str) -> None:
    kind, ran = CLASSES[name], 0
    for options in configurations(kind):
        try:
            theirs, expected = bare_run(kind, options)
        except (RuntimeError, ValueError) as raised:  # a combination that torch does not have
            refused: Exception | None = raised
        else:
            refused = None
        if refused is not None:
            with pytest.raises(type(refused), match=re.escape(str(refused))):
                wrapped_run(kind, options)
            continue
        ours, state = wrapped_run(kind, options)
        assert state["param_groups"][0].pop("gradkit")
        assert_same(state, expected, str(options))
        assert_same(ours.state_dict(), theirs.state_dict(), str(options))
        ran += 1
    assert ran >= 4


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_it_is_refused(name: str) -> None:
    base = CLASSES[name](list(network().parameters()))
    with pytest.raises(ValueError, match=f"base is of the class {name}, which .*; wrap "):
        gk.wrap(base)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_no_step_is_differentiable(name: str) -> None:
    kind = CLASSES[name]
    if "differentiable" not in inspect.signature(kind).parameters:
        assert name in {*REFUSED, "Adafactor", "Muon"}
        return
    base = kind(list(network().parameters()), differentiable=True)
    with pytest.raises(ValueError, match=f"group 0 of the {name} has differentiable=True.*; pass"):
        gk.wrap(base)
