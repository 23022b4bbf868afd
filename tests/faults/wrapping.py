"""Wrong arguments of `wrap` and of the transforms; what else must stay usable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gradkit as gk
from faults.case import Own
from faults.kind import Kind
from faults.world import World

Make = Callable[[World], object]


def spare(world: World) -> Callable[[], object]:
    """Another optimizer of the same model, not wrapped yet."""
    world.spare = torch.optim.SGD(world.model.parameters(), lr=0.1)

    def repair() -> None:
        world.spare = None

    return repair


def wrapping(*transforms: Callable[[World], Any], **options: Any) -> Make:
    """Wrap the spare optimizer."""

    def provoke(world: World) -> object:
        given = {name: of(world) if callable(of) else of for name, of in options.items()}
        return gk.wrap(world.spare, *(make(world) for make in transforms), **given)

    return provoke


def wrapping_twice(make: Callable[[World], gk.Transform], **options: Any) -> Make:
    """Wrap wrongly; then, while the error is still at hand, rightly with the same transform."""

    def provoke(world: World) -> object:
        transform = make(world)
        try:
            return gk.wrap(world.spare, transform, **options)
        except ValueError:
            again = torch.optim.SGD(world.model.parameters(), lr=0.1)
            gk.wrap(again, transform, model=world.model)
            raise

    return provoke


def base(make: Callable[[World], object]) -> Make:
    return lambda world: gk.wrap(make(world))


def itself(world: World) -> nn.Module:
    return world.model


def unlike(world: World) -> nn.Module:
    other = copy.deepcopy(world.model)
    other.head = nn.utils.skip_init(nn.Linear, 5, 2)
    return other


def scripted(world: World) -> nn.Module:
    return torch.jit.ScriptModule()


def embedding(world: World) -> object:
    model = nn.Embedding(3, 2, max_norm=1.0, _weight=torch.ones(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return gk.wrap(optimizer, model=model, engine="functional")


def shared(world: World) -> object:
    """A transform that keeps state for this case's optimizer."""
    own = Own()
    first = gk.wrap(torch.optim.SGD(world.model.parameters(), lr=0.1), own)
    assert first.transforms == (own,)
    return gk.wrap(world.spare, own)


def the_same_twice(world: World) -> object:
    transform = gk.SAM()
    return gk.wrap(world.spare, transform, transform)


TYPE, VALUE = TypeError, ValueError
DECAY = r"decay lies between 0 and 1"
ARGUMENTS: dict[str, tuple[Make, type[Exception], str]] = {
    "parameters for the base": (base(lambda w: w.model.parameters()), TYPE, "pass a torch.optim"),
    "a module for the base": (base(itself), TYPE, "base is a Network; pass a torch.optim"),
    "a wrapped base": (base(lambda w: w.optimizer), VALUE, r"all transforms to one wrap\(\)"),
    "LBFGS": (
        base(lambda w: torch.optim.LBFGS(w.model.parameters())), VALUE,
        "LBFGS.*; wrap a first-order optimizer",
    ),
    "SparseAdam": (
        base(lambda w: torch.optim.SparseAdam([*w.model.parameters()])), VALUE,
        "SparseAdam.*; wrap Adam",
    ),
    "a class for a transform": (wrapping(lambda w: gk.PCGrad), TYPE, r"write PCGrad\(\)"),
    "the model for a transform": (wrapping(itself), TYPE, "pass gradkit.*the model as model="),
    "a function for a transform": (wrapping(lambda w: len), TYPE, "pass gradkit transforms"),
    "one transform twice": (the_same_twice, VALUE, "passed twice; make two objects"),
    "a number for the model": (wrapping(model=3), TYPE, "pass the torch.nn.Module"),
    "an unknown engine": (wrapping(engine="fast"), VALUE, "'fast'; choose one of auto, func"),
    "no engine": (wrapping(engine=None), VALUE, "None; choose one of auto, functional"),
    "an unknown mode": (wrapping(nonfinite="stop"), VALUE, "'stop'; choose one of raise, skip"),
    "a negative max_norm": (wrapping(max_norm=-1.0), VALUE, "-1.0; it must be positive, or None"),
    "a max_norm of zero": (wrapping(max_norm=0), VALUE, "0; it must be positive, or None"),
    "a NaN for max_norm": (wrapping(max_norm=torch.nan), VALUE, "nan; it must be positive"),
    "a string for replay_rng": (wrapping(replay_rng="no"), TYPE, "replay_rng is.*'no'"),
    "a string for max_norm": (wrapping(max_norm="1"), TYPE, "max_norm is.*'1'"),
    "a model of somebody else": (wrapping(model=scripted), VALUE, "pass the module that is optim"),
    "the functional engine without a model": (
        wrapping(engine="functional"), VALUE, r"pass model= to gk.wrap\(\); or pass engine='inpla"
    ),
    "the functional engine with another model": (
        wrapping(engine="functional", model=lambda w: nn.utils.skip_init(nn.Linear, 1, 1)), VALUE,
        "needs every optimised parameter.*pass as model= a module that holds them all",
    ),
    "the functional engine and max_norm= of an embedding": (
        embedding, VALUE, "embedding with max_norm=.*or pass engine='inplace'"
    ),
    "a transform of another optimizer": (shared, VALUE, "belongs to another.*; make a new one"),
    "a wrong engine first, then a right one, with an EMA": (
        wrapping_twice(lambda w: gk.EMA(w.model, decay=0.9), engine="functional"), VALUE,
        "pass model=",
    ),
    "a rule after one by tensor": (
        wrapping(lambda w: gk.PCGrad(scope="tensor"), lambda w: gk.Mean()), VALUE,
        "cannot follow.*; put it first",
    ),
    "a rule after one by group": (
        wrapping(lambda w: gk.PCGrad(scope="group"), lambda w: gk.PCGrad()), VALUE,
        "cannot follow.*; put it first",
    ),
    "a negative rho": (lambda w: gk.SAM(rho=-0.1), VALUE, "rho is -0.1.*at least 0"),
    "a NaN for rho": (lambda w: gk.SAM(rho=torch.nan), VALUE, "rho is nan.*at least 0"),
    "an infinite rho": (lambda w: gk.SAM(rho=torch.inf), VALUE, "rho is inf.*finite"),
    "a string for rho": (lambda w: gk.SAM(rho="0.1"), TYPE, "rho is.*'0.1'"),
    "a decay above 1": (lambda w: gk.EMA(w.model, decay=1.1), VALUE, f"decay is 1.1.*{DECAY}"),
    "a NaN for decay": (lambda w: gk.EMA(w.model, decay=torch.nan), VALUE, f"is nan.*{DECAY}"),
    "no decay": (lambda w: gk.EMA(w.model, decay=None), TYPE, "decay is None"),
    "a negative decay_aligned": (
        lambda w: gk.GatedEMA(w.model, decay_aligned=-1.0), VALUE, f"decay_aligned is.*{DECAY}"
    ),
    "a decay_conflict above 1": (
        lambda w: gk.GatedEMA(w.model, decay_conflict=2.0), VALUE, f"decay_conflict is.*{DECAY}"
    ),
    "an unknown measure": (
        lambda w: gk.GatedEMA(w.model, measure="angle"), VALUE, "'angle'; choose 'sign_cosine' or"
    ),
    "unknown buffers": (
        lambda w: gk.EMA(w.model, decay=0.9, buffers="mean"), VALUE, "'mean'; choose 'copy', 'aver"
    ),
    "a gate of no parameters": (
        lambda w: gk.GatedEMA(w.model, only=lambda name, parameter: False), VALUE,
        "chooses none of the .* parameters that are trained",
    ),
    "between one and the same": (
        lambda w: gk.GatedEMA(w.model, between=("a", "a")), VALUE, "name two different objectives"
    ),
    "a NaN for threshold": (
        lambda w: gk.GatedEMA(w.model, threshold=torch.nan), VALUE, "threshold is nan"
    ),
    "a string for threshold": (
        lambda w: gk.GatedEMA(w.model, threshold="0"), TYPE, "threshold is.*'0'"
    ),
    "the student for a teacher": (
        lambda w: gk.EMA(w.model, w.model, decay=0.9), VALUE, "same module; pass a copy, or"
    ),
    "a teacher of other shapes": (
        lambda w: gk.EMA(w.model, unlike(w), decay=0.9), VALUE,
        "differ in 'head.weight'.*; use two copies of one architecture",
    ),
    "an unknown activation": (
        lambda w: gk.CosineLR(activation="cubic"), VALUE, "'cubic'; choose one of quad.*or pass a"
    ),
    "an unknown scope": (lambda w: gk.PCGrad(scope="layer"), VALUE, "'layer'; choose one of glob"),
    "an unknown reduction": (
        lambda w: gk.PCGrad(reduction="max"), VALUE, "'max'; choose 'sum' or 'mean'"
    ),
    "a seed for a generator": (lambda w: gk.PCGrad(generator=3), TYPE, "generator is.*torch.Gen"),
    "look-ahead along itself": (lambda w: gk.LookAhead("a", "a"), VALUE, "both 'a'.*SAM"),
    "a NaN for step_size": (lambda w: gk.LookAhead(step_size=torch.nan), VALUE, "step_size is nan"),
    "a string for step_size": (lambda w: gk.LookAhead(step_size="1"), TYPE, "step_size is.*'1'"),
}  # fmt: skip

KINDS = [
    Kind(name, provoke, error, message, prepare=spare, examples=8)
    for name, (provoke, error, message) in ARGUMENTS.items()
]
