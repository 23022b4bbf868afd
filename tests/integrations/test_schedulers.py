"""Every learning-rate scheduler of torch on a wrapped optimizer, beside a bare one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

import gradkit as gk
from integrations.references import assert_close, assert_equal, data, error, gradient, network

# Older versions of SequentialLR pass their own schedulers what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")

BATCHES = data(8)

MakeScheduler = Callable[[Optimizer], Any]


def in_sequence(optimizer: Optimizer) -> lr_scheduler.SequentialLR:
    first = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=2)
    second = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[2])


def chained(optimizer: Optimizer) -> lr_scheduler.ChainedScheduler:
    first = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=4)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, gamma=0.9)])


SCHEDULERS: dict[str, MakeScheduler] = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
    "SequentialLR": in_sequence,
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
}

BASES: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1),
    "AdamW, tensor": lambda net: torch.optim.AdamW(
        net.parameters(), lr=torch.tensor(0.1), foreach=False
    ),
}


def test_every_scheduler_of_torch_is_covered() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, lr_scheduler.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


def settings(optimizer: Optimizer) -> list[float]:
    """What schedulers write: the learning rate, and momentum or the first beta."""
    group = optimizer.param_groups[0]
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    return [float(group["lr"]), float(momentum)]


def train(optimizer: Optimizer, scheduler: Any, step: Callable[[Any], Tensor]) -> list[list[float]]:
    seen = []
    for batch in BATCHES:
        seen.append(settings(optimizer))
        loss = step(batch)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()
    return [*seen, settings(optimizer)]


# Every scheduler is made on both; one that also writes momentum, with every base.
MADE_ON = ("wrapped", "base")
CASES = {
    (name, [*BASES][(n + k) % len(BASES)], made_on)
    for n, name in enumerate(SCHEDULERS)
    for k, made_on in enumerate(MADE_ON)
} | {("OneCycleLR", base, made_on) for base in BASES for made_on in MADE_ON}


@pytest.mark.parametrize(("name", "base", "made_on"), sorted(CASES))
def test_rates_and_weights_equal_the_bare_optimizers(name: str, base: str, made_on: str) -> None:
    bare_net, net = network(), network()
    bare = BASES[base](bare_net)

    def bare_step(batch: tuple) -> Tensor:
        bare.zero_grad()
        loss = error(bare_net, batch)
        loss.backward()
        bare.step()
        return loss.detach()

    expected = train(bare, SCHEDULERS[name](bare), bare_step)
    wrapped = gk.wrap(BASES[base](net), model=net)
    scheduler = SCHEDULERS[name](wrapped if made_on == "wrapped" else wrapped.base)
    seen = train(wrapped, scheduler, lambda batch: wrapped.step(lambda: error(net, batch)))
    assert seen == expected
    assert len({tuple(each) for each in seen}) > 1
    assert_equal(net, bare_net)


def pair(net: nn.Module, batch: tuple) -> dict[str, Tensor]:
    scores = net(batch[0])
    return {"error": (scores - batch[1]).square().mean(), "sign": scores[:, 0].tanh().mean()}


@pytest.mark.parametrize(
    ("name", "engine"), [*zip(SCHEDULERS, cycle(["functional", "inplace"]), strict=False)]
)
def test_a_rate_scaled_for_one_step_does_not_disturb_the_schedule(name: str, engine: str) -> None:
    plain_net, net = network(), network()
    plain = BASES["SGD"](plain_net)

    def scaled_by_hand(batch: tuple) -> Tensor:
        losses = pair(plain_net, batch)
        weights = list(plain_net.parameters())
        first = torch.autograd.grad(losses["error"], weights, retain_graph=True)
        second = gradient(losses["sign"], weights)
        a, b = (torch.cat([part.reshape(-1) for part in each]) for each in (first, second))
        for weight, x, y in zip(weights, first, second, strict=True):
            weight.grad = x + y
        rate = plain.param_groups[0]["lr"]
        cosine = float(a @ b / (a.norm() * b.norm()))
        plain.param_groups[0]["lr"] = rate * (cosine + 1) ** 2 / 4
        plain.step()
        plain.param_groups[0]["lr"] = rate
        return sum(losses.values()).detach()

    expected = train(plain, SCHEDULERS[name](plain), scaled_by_hand)
    wrapped = gk.wrap(BASES["SGD"](net), gk.CosineLR("error", "sign"), model=net, engine=engine)
    scheduler = SCHEDULERS[name](wrapped)
    seen = train(wrapped, scheduler, lambda batch: wrapped.step(lambda: pair(net, batch)))
    assert seen == expected
    assert_close(net, plain_net)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_go_on_after_loading(name: str) -> None:
    def make() -> tuple[nn.Module, gk.GradientOptimizer, Any]:
        net = network()
        optimizer = gk.wrap(BASES["SGD"](net), gk.SAM(), model=net)
        return net, optimizer, SCHEDULERS[name](optimizer)

    def run(net: nn.Module, optimizer: gk.GradientOptimizer, scheduler: Any, batches: list) -> None:
        for batch in batches:
            loss = optimizer.step(lambda: error(net, batch))
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()

    whole = make()
    run(*whole, BATCHES[:3])
    resumed = make()
    for part, saved in zip(resumed, whole, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    run(*whole, BATCHES[3:])
    run(*resumed, BATCHES[3:])
    assert settings(whole[1]) == settings(resumed[1])
    assert_equal(resumed[0], whole[0])
