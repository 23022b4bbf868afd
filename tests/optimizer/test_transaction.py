"""Interrupts: a step happens as a whole or not at all."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)
PACKAGE = os.path.join(os.path.dirname(gk.__file__), "")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(engine: str) -> None:
    objectives_of = lambda model: {  # noqa: E731 # short and used twice
        "a": lambda: model(INPUT).square().mean(),
        "b": lambda: -model(INPUT).mean(),
    }

    def make() -> tuple[nn.Module, gk.GradientOptimizer]:
        model = network()
        chain = (gk.PCGrad(), gk.SAM(), gk.GatedEMA(model, between=("a", "b")))
        return model, gk.wrap(sgd(model), *chain, model=model, engine=engine)

    def snapshot(model: nn.Module, optimizer: gk.GradientOptimizer) -> dict[str, object]:
        return {
            "model": plain(model.state_dict()),
            "kinds": [type(p).__name__ for m in model.modules() for p in m._parameters.values()],
            "grads": [plain(parameter.grad) for parameter in model.parameters()],
            "state": plain(optimizer.state_dict()),
            "teacher": plain(optimizer.transforms[2].teacher.state_dict()),
        }

    model, optimizer = make()
    optimizer.step(objectives_of(model))
    before = snapshot(model, optimizer)
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        # The package's own lines only: other code may hold a lock that an interrupt leaves locked.
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines += event == "line"
        return count

    tracer = sys.gettrace()  # a coverage measurement's, perhaps
    sys.settrace(count)
    optimizer.step(objectives_of(model))
    sys.settrace(tracer)
    after = snapshot(model, optimizer)
    assert before != after

    outcomes = set()
    for target in range(0, lines, max(1, lines // 40)):
        model, optimizer = make()
        optimizer.step(objectives_of(model))
        position = 0

        def strike(frame, event, _, target=target):
            nonlocal position
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                position += 1
                if position == target + 1:
                    signal.raise_signal(signal.SIGINT)
            return strike

        try:
            sys.settrace(strike)
            optimizer.step(objectives_of(model))
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        state = snapshot(model, optimizer)
        assert state in (before, after)
        outcomes.add(state == after)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        optimizer.step(objectives_of(model))  # and it goes on
    assert outcomes == {True, False}


def test_signals_outside_the_main_thread() -> None:
    import threading

    model = network()
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model)
    thread = threading.Thread(target=lambda: optimizer.step(lambda: model(INPUT).sum()))
    thread.start()
    thread.join()
    assert optimizer.last_step.applied


def test_every_transform_is_told_of_a_step_though_one_raises() -> None:
    told: list[str] = []

    class Tells(gk.Transform):
        def __init__(self, name: str) -> None:
            self.name = name

        def after_step(self, context: gk.Context) -> None:
            told.append(self.name)
            if self.name != "second":
                raise KeyError(self.name)

    model = network()
    chain = [Tells(name) for name in ("first", "second", "third")]
    optimizer = gk.wrap(sgd(model), *chain, model=model)
    with pytest.raises(KeyError, match="third") as raised:
        optimizer.step(lambda: model(INPUT).sum())
    assert told == ["first", "second", "third"]
    assert str(raised.value.__context__) == "'first'"
