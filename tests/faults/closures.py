"""Faults inside closures: exceptions, interrupts, and what closures do before they raise."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradkit as gk
from faults.case import Shape
from faults.kind import Kind, doing, raising, striking, throw
from faults.world import World


class Abort(BaseException):
    """Not an Exception."""


def no_generator(shape: Shape) -> bool:
    return not shape.form.endswith("generator")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("bad"),
    "KeyError": lambda: KeyError("bad"),
    "RuntimeError": lambda: RuntimeError("bad"),
    "MemoryError": lambda: MemoryError("bad"),
    "RecursionError": lambda: RecursionError("bad"),
    "KeyboardInterrupt": lambda: KeyboardInterrupt("bad"),
    "SystemExit": lambda: SystemExit("bad"),
    "GeneratorExit": lambda: GeneratorExit("bad"),
    "BaseException": lambda: Abort("bad"),
    "NonFiniteError": lambda: gk.NonFiniteError("bad"),
}


def own_signal_handler(world: World) -> Callable[[], object]:
    world.error = Abort("by the user's handler")
    before = signal.signal(signal.SIGINT, lambda *_: throw(world.error))
    return lambda: signal.signal(signal.SIGINT, before)


def interrupt(world: World) -> object:
    return striking(
        world, lambda loss: (signal.raise_signal(signal.SIGINT), loss)[1], world.case.moment
    )


def in_backward(act: Callable[[World], object]) -> Callable[[World], object]:
    """Act while autograd differentiates the victim's loss."""

    def provoke(world: World) -> object:
        def strike(loss: Tensor) -> Tensor:
            loss = loss * 1
            loss.register_hook(lambda gradient: act(world) and None)
            return loss

        return striking(world, strike)

    return provoke


def raise_in_backward(world: World) -> object:
    world.error = KeyError("in backward")
    return throw(world.error)


def in_forward_hook(world: World) -> object:
    world.error = ValueError("in a hook")
    handle = world.model.head.register_forward_hook(lambda *_: throw(world.error))
    try:
        return world.step()
    finally:
        handle.remove()


def a_model() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    return model


def nested_failure(world: World) -> object:
    """Another gradkit optimizer fails inside the closure."""
    other = a_model()
    world.error = KeyError("in the other one")
    inner = gk.wrap(torch.optim.SGD(other.parameters(), lr=0.1), gk.SAM(), model=other)
    return striking(world, lambda loss: inner.step(lambda: throw(world.error)), world.case.moment)


def nested_success(world: World) -> object:
    """Another gradkit optimizer steps inside the closure."""
    other = a_model()
    engine = world.case.engine
    inner = gk.wrap(torch.optim.SGD(other.parameters(), 0.5), gk.SAM(), model=other, engine=engine)

    def strike(loss: Tensor) -> Tensor:
        inner.step(lambda: other.weight.sum())
        assert other.weight.item() == 0.5
        return loss

    return striking(world, strike)


@torch.no_grad()
def replace_data(world: World) -> None:
    world.model.head.weight.data = torch.zeros_like(world.model.head.weight)


def replace_parameter(world: World) -> None:
    world.model.head.weight = nn.Parameter(torch.zeros_like(world.model.head.weight))


@torch.no_grad()
def write_buffers(world: World) -> None:
    for buffer in world.model.buffers():
        buffer.fill_(7)


def replace_buffer(world: World) -> None:
    world.model.count = torch.full((3,), 7.0)


def add_buffer(world: World) -> None:
    world.model.head.register_buffer("fresh", torch.zeros(2))


def delete_buffer(world: World) -> None:
    del world.model.count


def resize_buffer(world: World) -> None:
    world.model.count.resize_(4)


def retype_buffer(world: World) -> None:
    world.model.count.data = torch.zeros((), dtype=torch.int64)


def draw(world: World) -> None:
    torch.rand(3)


def reseed(world: World) -> None:
    torch.manual_seed(1234)


def draw_from_transforms(world: World) -> None:
    for transform in world.optimizer.transforms:
        if transform.generator is not None:
            torch.rand(3, generator=transform.generator)


def set_grads(world: World) -> None:
    for parameter in world.model.parameters():
        parameter.grad = torch.ones_like(parameter)


def clear_grads(world: World) -> None:
    world.optimizer.zero_grad()


def zero_grads(world: World) -> None:
    world.optimizer.zero_grad(set_to_none=False)


def clear_model_grads(world: World) -> None:
    world.model.zero_grad()


def grads_off(world: World) -> None:
    torch.set_grad_enabled(False)


EFFECTS: dict[str, Callable[[World], object]] = {
    "replaces a parameter's data": replace_data,
    "replaces a parameter": replace_parameter,
    "writes buffers": write_buffers,
    "replaces a buffer": replace_buffer,
    "adds a buffer": add_buffer,
    "deletes a buffer": delete_buffer,
    "resizes a buffer": resize_buffer,
    "retypes a buffer": retype_buffer,
    "draws random numbers": draw,
    "seeds": reseed,
    "draws from transforms' generators": draw_from_transforms,
    "sets gradients": set_grads,
    "calls zero_grad": clear_grads,
    "calls zero_grad(set_to_none=False)": zero_grads,
    "calls the model's zero_grad": clear_model_grads,
    "switches gradients off": grads_off,
}

KINDS = [
    *(
        Kind(f"a closure raises {name}", raising(make), type(make()), "bad")
        for name, make in ERRORS.items()
    ),
    Kind(
        "a closure raises StopIteration",
        raising(lambda: StopIteration("bad")),
        StopIteration,
        "bad",
        fits=no_generator,  # Python itself allows none in generators
    ),
    *(
        Kind(f"a closure {name} and raises", doing(act), KeyError, "after doing something")
        for name, act in EFFECTS.items()
    ),
    Kind("Ctrl-C in a closure", interrupt, KeyboardInterrupt),
    Kind(
        "a handler of the user's for Ctrl-C",
        interrupt,
        Abort,
        "user's handler",
        prepare=own_signal_handler,
    ),
    Kind(
        "Ctrl-C during a backward pass",
        in_backward(lambda world: signal.raise_signal(signal.SIGINT)),
        KeyboardInterrupt,
        differentiated=True,
    ),
    Kind(
        "an exception during a backward pass",
        in_backward(raise_in_backward),
        KeyError,
        "in backward",
        differentiated=True,
    ),
    Kind("a forward hook raises", in_forward_hook, ValueError, "in a hook"),
    Kind(
        "the same optimizer steps in a closure",
        lambda world: striking(world, lambda loss: world.step(), world.case.moment),
        RuntimeError,
        "called from inside one of its closures, which only compute losses",
    ),
    Kind(
        "gradients() in a closure",
        lambda world: striking(
            world, lambda loss: world.optimizer.gradients(world.objectives()), world.case.moment
        ),
        RuntimeError,
        "called from inside one of its closures, which only compute losses",
    ),
    Kind(
        "state_dict() in a closure that then raises",
        doing(lambda world: world.optimizer.state_dict()),
        KeyError,
        "after doing something",
        but=frozenset({"text in the groups"}),  # the text in them is brought up to date
    ),
    Kind(
        "another gradkit optimizer steps in a closure",
        nested_success,
        None,
        outcome="works",
    ),
    Kind(
        "another gradkit optimizer fails in a closure",
        nested_failure,
        KeyError,
        "in the other one",
    ),
]
