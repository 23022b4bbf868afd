"""What a kind of fault is, and the cases it is tried in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

import gradkit as gk
from faults.case import BASES, ENGINES, NETWORKS, SHAPES, Case, Shape
from faults.world import Strike, World

Outcome = Literal["raises", "nonfinite", "unchanged", "works", "applied", "broken"]


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: What goes wrong.
        provoke: Makes it go wrong.
        error: What must be raised; None if nothing.
        message: A pattern of its message, which names what is wrong and says what to do;
            `{victim}` stands for the objective that is struck.
        outcome: "raises": nothing is lost. "nonfinite": that, or a skipped step, by the case's
            mode. "unchanged": no error, and nothing happens. "works": no fault at all; the same
            result as `twin`. "applied": raised once the step is done, with the result of `twin`.
            "broken": raised by the base optimizer while it steps; all but `but` is as before.
        fits: Whether it can happen to this chain and form.
        fixed: For fields of the case, the values that they may take.
        prepare: Breaks something that then stays broken; returns how it is repaired.
        extra: Makes a transform that is added to the chain, first or last.
        twin: What the undisturbed twin does meanwhile, where it is "works" or "applied".
        differentiated: Whether only what is differentiated can be struck.
        gradless: Whether gradients of the user's own, in `.grad`, would be taken instead.
        but: Parts that differ for a good reason.
        examples: In how many cases it is tried.
    """

    name: str
    provoke: Callable[[World], object]
    error: type[BaseException] | tuple[type[BaseException], ...] | None
    message: str = ""
    outcome: Outcome = "raises"
    fits: Callable[[Shape], bool] = lambda shape: True
    fixed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    prepare: Callable[[World], Callable[[], object]] | None = None
    extra: Callable[[], gk.Transform] | None = None
    twin: Callable[[World], object] = World.step
    differentiated: bool = False
    gradless: bool = False
    but: frozenset[str] = frozenset()
    examples: int = 9


FIELDS: dict[str, Sequence[Any]] = {
    "engine": ENGINES,
    "base": tuple(BASES),
    "network": tuple(NETWORKS),
    "extras": (False, True),
    "groups": (1, 2),
    "dtype": (torch.float32, torch.float64),
    "tensor_lr": (False, True),
    "steps": (0, 1, 2),
    "grads": ("left", "cleared", "some", "all"),
    "nonfinite": ("raise", "skip", "ignore"),
    "max_norm": (None, 0.5),
    "replay_rng": (False, True),
    "moment": ("before", "after", "end"),
    "choice": tuple(range(6)),
}


def cases(kind: Kind) -> list[Case]:
    """Random cases in which this kind of fault can happen, the same in each run.

    As in a Latin hypercube, each value of each field comes up as often as any other, and so does
    each chain and each form as far as they fit.
    """
    random = Random(kind.name)
    options = {**FIELDS, **kind.fixed}
    if kind.outcome == "nonfinite":
        options["nonfinite"] = ("raise", "skip")
    shapes = _shapes(kind, random)
    columns = {name: _column(values, kind.examples, random) for name, values in options.items()}
    made = []
    for shape, *values in zip(shapes, *columns.values(), strict=True):
        drawn = dict(zip(columns, values, strict=True))
        if kind.gradless and len(shape.names) == 1 and drawn["grads"] in ("some", "all"):
            drawn["grads"] = random.choice(("left", "cleared"))
        victim, visit = random.choice(shape.differentiated if kind.differentiated else shape.places)
        made.append(Case(**{"shape": shape, "victim": victim, "visit": visit, **drawn}))
    return made


def _column(values: Sequence[Any], count: int, random: Random) -> list[Any]:
    whole, rest = divmod(count, len(values))
    column = [*values * whole, *random.sample(values, rest)]
    random.shuffle(column)
    return column


def _shapes(kind: Kind, random: Random) -> list[Shape]:
    fitting = [shape for shape in SHAPES if kind.fits(shape)]
    used: Counter[str] = Counter()
    shapes = []
    for _ in range(kind.examples):
        random.shuffle(fitting)
        shape = min(fitting, key=lambda shape: used[shape.chain] + used[shape.form])
        used.update((shape.chain, shape.form))
        shapes.append(shape)
    return shapes


def striking(world: World, act: Callable[[Tensor], object], moment: str = "after") -> object:
    """Take a step in which `act` strikes the case's victim."""
    world.strike = Strike(world, act, moment)
    return world.step(world.strike)


def raising(make: Callable[[], BaseException]) -> Callable[[World], object]:
    """A closure that raises, at the case's moment."""

    def provoke(world: World) -> object:
        world.error = make()
        return striking(world, lambda loss: throw(world.error), world.case.moment)

    return provoke


def returning(change: Callable[[World, Tensor], object]) -> Callable[[World], object]:
    """A closure that returns (or yields) something else in place of its loss."""
    return lambda world: striking(world, lambda loss: change(world, loss))


def doing(act: Callable[[World], object]) -> Callable[[World], object]:
    """A closure that does something and then raises."""

    def provoke(world: World) -> object:
        world.error = KeyError("after doing something")

        def strike(loss: Tensor) -> object:
            act(world)
            return throw(world.error)

        return striking(world, strike, world.case.moment)

    return provoke


def throw(error: BaseException | None) -> None:
    """Raise it."""
    assert error is not None
    raise error


def stepping(*arguments: object) -> Callable[[World], object]:
    """A call of `step` with these arguments."""
    return lambda world: world.optimizer.step(*arguments)
