"""Transforms and base optimizers that fail, before, while and after the step is applied."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch

import gradkit as gk
from faults.case import Shape
from faults.kind import Kind, throw
from faults.world import World

AFTER = "after the step"


class Saboteur(gk.Transform):
    """Does nothing until it is armed."""

    def __init__(self, where: str, act: Callable[[Any], object]) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.where, self.act = where, act
        self.armed = False
        self.calls = 0

    def initial_vectors(self, layout):
        return {"kept": torch.zeros(layout.numel, dtype=layout.dtype)}

    def strike(self, where: str, value: Any = None) -> Any:
        if where != self.where or not self.armed:
            return value
        return self.act(value)

    def around(self, inner, context):
        self.calls = 0

        def oracle(at=None, only=None):
            self.calls += 1
            self.strike(f"call {self.calls}")
            gradients = inner(at, only)
            context.propose(self, kept=gradients.direction())
            if self.armed and self.where == "proposal":
                context.propose(self, kept=torch.zeros(1000))
            if self.armed and self.where == "question":
                inner(at, ("unknown",))
            return self.strike(f"result {self.calls}", gradients)

        return self.strike("around", oracle)

    def after_step(self, context):
        self.strike(AFTER)


def draw_and_throw(world: World) -> None:
    if world.extra.where != AFTER:
        torch.rand(2, generator=world.extra.generator)
    throw(world.error)


def sabotage(where: str, act: Callable[..., object] | None = None) -> dict[str, Any]:
    """The part of a kind that has a saboteur."""

    def provoke(world: World) -> object:
        raises = act is None and where not in ("proposal", "question")
        world.error = KeyError("sabotage") if raises else None
        world.extra.act = act or (lambda value: draw_and_throw(world))
        world.extra.armed = True
        try:
            return world.step()
        finally:
            world.extra.armed = False

    return {"provoke": provoke, "extra": lambda: Saboteur(where, throw)}


def interrupt(value: Any) -> Any:
    signal.raise_signal(signal.SIGINT)
    return value


def nan_weights(gradients: gk.Gradients) -> gk.Gradients:
    return gradients.replace(weights=gradients.weights * torch.nan)


def nan_update(gradients: gk.Gradients) -> gk.Gradients:
    return gradients.replace(update=gradients.direction() * torch.nan)


def nan_scale(gradients: gk.Gradients) -> gk.Gradients:
    return gradients.replace(lr_scale=gradients.lr_scale * torch.nan)


def base_step(act: Callable[[World, Callable[[], object]], object]) -> Callable[[World], object]:
    """A base optimizer whose `step` does something else; it gets the true one."""

    def provoke(world: World) -> object:
        true = world.base.step
        world.base.step = lambda: act(world, true)
        try:
            return world.step()
        finally:
            del world.base.step

    return provoke


def fail_first(world: World, step: Callable[[], object]) -> None:
    world.error = MemoryError("base")
    torch.rand(1)
    throw(world.error)


def fail_midway(world: World, step: Callable[[], object]) -> None:
    world.error = MemoryError("base")
    step()
    throw(world.error)


def interrupt_step(world: World, step: Callable[[], object]) -> None:
    signal.raise_signal(signal.SIGINT)
    step()
    signal.raise_signal(signal.SIGINT)


def hooked(register: Callable[[World], Callable[..., Any]]) -> Callable[[World], object]:
    """A step hook that raises."""

    def provoke(world: World) -> object:
        world.error = KeyError("hook")
        handle = register(world)(lambda *_: throw(world.error))
        try:
            return world.step()
        finally:
            handle.remove()

    return provoke


def hook_of_junk(world: World) -> object:
    handle = world.optimizer.register_step_pre_hook(lambda *_: 3)
    try:
        return world.step()
    finally:
        handle.remove()


def activation(make: Callable[[torch.Tensor], object]) -> Callable[[World], object]:
    """CosineLR with an activation of the user's own."""

    def provoke(world: World) -> object:
        (cosine,) = (t for t in world.optimizer.transforms if isinstance(t, gk.CosineLR))
        true, cosine.activation = cosine.activation, make
        try:
            return world.step()
        finally:
            cosine.activation = true

    return provoke


def without_lr(world: World) -> Callable[[], object]:
    groups = world.base.param_groups
    rates = [group.pop("lr") for group in groups]

    def repair() -> None:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    return repair


def scales(shape: Shape) -> bool:
    return shape.chain == "grata"


def sam(shape: Shape) -> bool:
    return "sam" in shape.chain


FIRST, LAST = {"choice": (1,)}, {"choice": (0,)}
NOTHING = r"nothing was changed\. Look at.*pass nonfinite='skip'"

KINDS = [
    Kind("a transform raises in around", error=KeyError, message="sabotage", **sabotage("around")),
    Kind("a transform raises before its inner oracle", error=KeyError, message="sabotage",
         **sabotage("call 1")),
    Kind("a transform raises after its inner oracle", error=KeyError, message="sabotage",
         **sabotage("result 1")),
    Kind("a transform raises at displaced weights", error=KeyError, message="sabotage",
         fits=sam, fixed=FIRST, **sabotage("result 2")),
    Kind("a transform returns no oracle", error=TypeError, message="Saboteur.*around.*return",
         **sabotage("around", lambda oracle: None)),
    Kind("a transform's oracle returns nothing", error=TypeError, message="Saboteur.*return",
         fixed=LAST,
         **sabotage("result 1", lambda gradients: None)),
    Kind("a transform asks for an unknown objective", error=ValueError,
         message="there is no objective 'unknown'; there are '", fixed=FIRST,
         **sabotage("question")),
    Kind("a transform proposes a vector of another length", error=ValueError,
         message="Saboteur.*'kept'.*shape", **sabotage("proposal")),
    Kind("weights that are NaN", error=gk.NonFiniteError, outcome="nonfinite", fixed=LAST,
         message=f"transforms' result is not finite.*; {NOTHING}",
         **sabotage("result 1", nan_weights)),
    Kind("an update that is NaN", error=gk.NonFiniteError, outcome="nonfinite", fixed=LAST,
         message=f"transforms' result is not finite.*; {NOTHING}",
         **sabotage("result 1", nan_update)),
    Kind("a factor of the learning rate that is NaN", error=gk.NonFiniteError, outcome="nonfinite",
         fixed=LAST, message=f"learning rate's factor is nan; {NOTHING}",
         **sabotage("result 1", nan_scale)),
    Kind("Ctrl-C in a transform after the last closure", error=KeyboardInterrupt,
         outcome="applied", fixed=LAST, **sabotage("result 1", interrupt)),
    Kind("Ctrl-C in after_step", error=KeyboardInterrupt, outcome="applied",
         **sabotage(AFTER, interrupt)),
    Kind("after_step raises", error=KeyError, message="sabotage", outcome="applied",
         **sabotage(AFTER)),
    Kind("the base optimizer raises before it changes anything", base_step(fail_first),
         MemoryError, "base"),
    Kind("the base optimizer raises while its learning rate is scaled", base_step(fail_first),
         MemoryError, "base", fits=scales),
    Kind("the base optimizer raises once it has changed something", base_step(fail_midway),
         MemoryError, "base", outcome="broken", but=frozenset({"weights", "optimizer state"})),
    Kind("Ctrl-C while the base optimizer steps", base_step(interrupt_step), KeyboardInterrupt,
         outcome="applied"),
    Kind("a step pre-hook of the base raises",
         hooked(lambda world: world.base.register_step_pre_hook), KeyError, "hook"),
    Kind("a step pre-hook raises", hooked(lambda world: world.optimizer.register_step_pre_hook),
         KeyError, "hook"),
    Kind("a step post-hook raises", hooked(lambda world: world.optimizer.register_step_post_hook),
         KeyError, "hook", outcome="applied"),
    Kind("a step pre-hook returns junk", hook_of_junk, (TypeError, ValueError, RuntimeError),
         "None or a tuple"),
    Kind("an activation raises", activation(lambda cosine: 1 / 0), ZeroDivisionError, "",
         fits=scales),
    Kind("an activation returns a vector", activation(lambda cosine: cosine.expand(2)),
         (TypeError, ValueError), "activation.*one number", fits=scales),
    Kind("an activation returns nothing", activation(lambda cosine: None),
         (TypeError, ValueError), "activation.*one number", fits=scales),
    Kind("an activation returns NaN", activation(lambda cosine: cosine * torch.nan),
         gk.NonFiniteError, f"factor is nan; {NOTHING}", outcome="nonfinite", fits=scales),
    Kind("a base optimizer without a learning rate", World.step, (KeyError, ValueError),
         "CosineLR|learning rate", prepare=without_lr, fits=scales),
]  # fmt: skip
