"""Hooks round a step: as torch runs them round a bare optimizer's, with the wrapped one, once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import StepLR

import gradkit as gk

Log = list[tuple[str, str]]


@pytest.fixture
def log() -> Iterator[Log]:
    """What global hooks note, for as long as a test takes."""
    noted: Log = []
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(noting(noted, "global pre")),
        torch_optimizer.register_optimizer_step_post_hook(noting(noted, "global post")),
    ]
    registered = [*torch_optimizer._global_optimizer_pre_hooks.values()]
    yield noted
    assert [*torch_optimizer._global_optimizer_pre_hooks.values()] == registered
    for handle in handles:
        handle.remove()
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks


def noting(log: Log, name: str) -> Callable[..., None]:
    return lambda optimizer, args, kwargs: log.append((name, type(optimizer).__name__))


class Outer(Optimizer):
    """Holds another optimizer, whose step is hooked too, and has a hooked step of its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


class Unhooked(SGD):
    """Has an attribute in place of `step`, as some tools leave one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        method = self.step
        self.step = lambda: method()


def scheduled(base: Optimizer) -> Optimizer:
    StepLR(base, 1)
    return base


BASES: dict[str, Callable[[nn.Parameter], Optimizer]] = {
    "plain": lambda w: SGD([w], lr=0.1),
    "one that holds another": lambda w: Outer(SGD([w], lr=0.1)),
    "one with another step": lambda w: Unhooked([w], lr=0.1),
    "one with a scheduler": lambda w: scheduled(SGD([w], lr=0.1)),
}
ALL = ["global pre", "pre", "post", "global post"]


def hooked(log: Log, base: Callable[[nn.Parameter], Optimizer] = BASES["plain"]) -> tuple:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(base(weight), gk.SAM())
    optimizer.register_step_pre_hook(noting(log, "pre"))
    optimizer.register_step_post_hook(noting(log, "post"))
    return weight, optimizer


@pytest.mark.parametrize("name", BASES)
def test_each_hook_runs_once_a_step_with_the_wrapped_optimizer(name: str, log: Log) -> None:
    weight, optimizer = hooked(log, BASES[name])
    for _ in range(2):
        optimizer.step(lambda: weight.square().sum())
        assert log == [(each, "GradientOptimizer") for each in ALL]
        log.clear()
    assert not torch.equal(weight, torch.ones(2))


def test_hooks_of_the_base_run_inside(log: Log) -> None:
    weight, optimizer = hooked(log)
    optimizer.base.register_step_pre_hook(noting(log, "base pre"))
    optimizer.base.register_step_post_hook(noting(log, "base post"))
    optimizer.step(lambda: weight.square().sum())
    names = ["global pre", "pre", "base pre", "base post", "post", "global post"]
    assert [name for name, _ in log] == names
    assert {kind for name, kind in log if name.startswith("base")} == {"SGD"}


@pytest.mark.filterwarnings("ignore:step.. had nothing to step on")
@pytest.mark.parametrize("loss", [torch.nan, 1.0], ids=["skipped", "without a closure"])
def test_hooks_run_for_a_step_that_changes_nothing(loss: float, log: Log) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(SGD([weight], lr=0.1), nonfinite="skip")
    optimizer.step(None if loss == 1.0 else lambda: loss * weight.sum())
    assert torch.equal(weight, torch.ones(2))
    assert [name for name, _ in log] == ["global pre", "global post"]


def test_a_step_that_fails_runs_no_later_hook_and_leaves_none_muted(log: Log) -> None:
    class Failing(SGD):
        def step(self, closure=None):
            raise RuntimeError("out of order")

    weight, optimizer = hooked(log, lambda w: Failing([w], lr=0.1))
    with pytest.raises(RuntimeError, match="out of order"):
        optimizer.step(lambda: weight.square().sum())
    assert [name for name, _ in log] == ["global pre", "pre"]


def test_other_optimizers_keep_theirs(log: Log) -> None:
    weight, optimizer = hooked(log)
    other = nn.Parameter(torch.ones(2))
    bare = SGD([other], lr=0.1)

    def closure():
        bare.step()
        return weight.square().sum()

    optimizer.step(closure)
    bare.step()
    kinds = [kind for name, kind in log if name == "global pre"]
    assert kinds == ["GradientOptimizer", "SGD", "SGD", "SGD"]  # SAM evaluates twice


def test_another_thread_keeps_its_hooks_meanwhile(log: Log) -> None:
    other = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    weight, optimizer = hooked(log)

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=other.step)
        thread.start()
        thread.join()

    optimizer.base.register_step_pre_hook(meanwhile)
    optimizer.step(lambda: weight.square().sum())
    assert log.count(("global pre", "SGD")) == 1
    assert log.count(("global post", "SGD")) == 1


def test_a_global_hook_may_step_a_wrapped_optimizer() -> None:
    weight = nn.Parameter(torch.ones(2))
    inner = gk.wrap(SGD([weight], lr=0.5))
    steps: list[str] = []

    def also(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        steps.append(type(optimizer).__name__)
        if optimizer is not inner:
            inner.step(lambda: weight.sum())

    handle = torch_optimizer.register_optimizer_step_pre_hook(also)
    try:
        SGD([nn.Parameter(torch.ones(2))], lr=0.1).step()
    finally:
        handle.remove()
    assert steps == ["SGD", "GradientOptimizer"]
    assert torch.equal(weight, torch.full((2,), 0.5))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_global_hook_may_exchange_the_closure(by_name: bool, log: Log) -> None:
    weight, optimizer = hooked(log)
    seen: list[Any] = []

    def exchange(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple:
        def twice() -> torch.Tensor:
            return 2 * args[1]()

        return ((optimizer,), {"closure": twice}) if by_name else ((optimizer, twice), {})

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(exchange),
        torch_optimizer.register_optimizer_step_post_hook(lambda o, a, k: seen.append(a[1]())),
    ]
    assert optimizer.step(lambda: weight.sum()) == 4.0
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], 2 * weight.sum())  # what the step has been given
    assert [name for name, _ in log] == ALL


def test_the_profiler_names_the_base() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(SGD([weight], lr=0.1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(lambda: weight.sum())
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_step_hooks_are_called_as_torch_calls_them() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0))
    seen = []

    def rewrite(self, args, kwargs):
        assert args[0] is self
        return (self, lambda: 3 * weight.sum()), kwargs

    optimizer.register_step_pre_hook(rewrite)
    optimizer.register_step_post_hook(lambda self, args, kwargs: seen.append(args[0] is self))
    optimizer.step(lambda: weight.sum())
    assert weight.item() == -2.0
    assert seen == [True]


class Remembering(gk.Transform):
    """Keeps where the weights were before the first step."""

    def initial_vectors(self, layout):
        return {"start": torch.cat([p.detach().reshape(-1) for p in layout.parameters])}

    def around(self, inner, context):
        return inner


def test_a_hook_that_fails_before_the_first_step_leaves_no_vector() -> None:
    """Weights may still change before the first step, and vectors begin where they are then."""
    model, remembering = nn.Linear(2, 1), Remembering()
    optimizer = gk.wrap(SGD(model.parameters(), lr=0.1), remembering, model=model)
    handle = optimizer.register_step_pre_hook(lambda *_: {"junk": 1})
    with pytest.raises(RuntimeError, match="a step pre-hook returned"):
        optimizer.step(lambda: model.weight.sum())
    assert not remembering.vectors
    handle.remove()
    torch.nn.init.constant_(model.weight, 5.0)
    optimizer.step(lambda: model.weight.sum())
    assert remembering.vectors["start"][:2].tolist() == [5.0, 5.0]
