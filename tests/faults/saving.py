"""State dicts that belong to something else, or are broken; hooks that raise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch

import gradkit as gk
from faults.case import CHAINS, Shape
from faults.kind import Kind, throw
from faults.world import World

State = dict[str, Any]


def loading(change: Callable[[State], Any]) -> dict[str, Any]:
    """Load the optimizer's own state dict, changed."""

    def prepare(world: World) -> Callable[[], object]:
        world.saved = change(copy.deepcopy(world.optimizer.state_dict()))
        return lambda: None

    return {
        "prepare": prepare,
        "provoke": lambda world: world.optimizer.load_state_dict(world.saved),
        "twin": World.nothing,
    }


def editing(change: Callable[[State], object]) -> Callable[[State], State]:
    """Change the transforms' part of a state dict."""

    def edit(state: State) -> State:
        text = json.loads(state["param_groups"][0]["gradkit"])
        change(text)
        state["param_groups"][0]["gradkit"] = json.dumps(text)
        return state

    return edit


def each_transform(change: Callable[[dict[str, Any]], object]) -> Callable[[State], State]:
    return editing(lambda text: [change(entry) for entry in text["transforms"]])


def of_another_chain(world: World) -> Callable[[], object]:
    """The state of the same optimizer with other transforms."""
    model = copy.deepcopy(world.model)
    base = type(world.base)(model.parameters(), lr=0.1)
    other = "pcgrad-sam" if world.shape.chain != "pcgrad-sam" else "own"
    world.saved = gk.wrap(base, *CHAINS[other](model), model=model).state_dict()
    return lambda: None


def load(world: World) -> object:
    return world.optimizer.load_state_dict(world.saved)


def swapped(state: State) -> State:
    return editing(lambda text: text["transforms"].reverse())(state)


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def cut_json(state: State) -> State:
    text = state["param_groups"][0]["gradkit"]
    state["param_groups"][0]["gradkit"] = text[: len(text) // 2]
    return state


def cut_generator(entry: dict[str, Any]) -> None:
    if entry["generator"]:
        entry["generator"].update(tensor="", shape=[0])


def fewer_parameters(state: State) -> State:
    state["param_groups"][0]["params"].pop()
    return state


def other_shapes(state: State) -> State:
    for values in state["state"].values():
        values.update({name: torch.zeros(7) for name in values if "gradkit." in name})
    return state


def more_groups(state: State) -> State:
    state["param_groups"].append(copy.deepcopy(state["param_groups"][-1]))
    return state


def no_groups(state: State) -> State:
    return {**state, "param_groups": []}


def foreign_name(state: State) -> State:
    """The transforms' state under a name of the wrong type."""
    state["param_groups"][0]["gradkit"] = 3
    return state


def bare(state: State) -> State:
    del state["param_groups"][0]["gradkit"]
    for values in state["state"].values():
        for name in [name for name in values if "gradkit." in name]:
            del values[name]
    state["state"] = {key: values for key, values in state["state"].items() if values}
    return state


def pre_hook(world: World) -> object:
    world.error = KeyError("load hook")
    handle = world.optimizer.register_load_state_dict_pre_hook(lambda *_: throw(world.error))
    try:
        return world.optimizer.load_state_dict(world.optimizer.state_dict())
    finally:
        handle.remove()


def save_hook(world: World) -> object:
    world.error = KeyError("save hook")
    handle = world.optimizer.register_state_dict_pre_hook(lambda *_: throw(world.error))
    try:
        return world.optimizer.state_dict()
    finally:
        handle.remove()


def unserialisable(world: World) -> Callable[[], object]:
    (own,) = world.optimizer.transforms
    own.state["model"] = object()
    return lambda: own.state.pop("model")


def own(shape: Shape) -> bool:
    return shape.chain == "own"


def stateless(shape: Shape) -> bool:
    """Chains whose transforms remember nothing, so that there is nothing to load."""
    return shape.chain in ("none", "sam", "grata")


def drawing(shape: Shape) -> bool:
    return shape.chain in ("pcgrad", "pcgrad-tensor", "pcgrad-sam", "own")


def counting(shape: Shape) -> bool:
    return shape.chain in ("own", "gated", "sam-ema")


def two(shape: Shape) -> bool:
    return shape.chain in ("pcgrad-sam", "sam-ema", "grata")


MESSAGE = "the saved state is of the transforms .*; wrap the same ones in the same order"
WRONG = (TypeError, ValueError)
RATES = frozenset({"learning rate objects"})  # torch makes new ones, too
DAMAGED = "the saved state.*(damaged|incomplete|no state dict|is not)"

KINDS = [
    Kind("the state of another chain", load, ValueError, MESSAGE, prepare=of_another_chain),
    Kind("the state of another order", error=ValueError, message=MESSAGE, fits=two,
         **loading(swapped)),
    Kind("the state of a newer version", error=ValueError,
         message="has format 99, .*; load it with the version that wrote it",
         **loading(editing(lambda text: text.update(version=99)))),
    Kind("a state without a version", error=ValueError,
         message="has format None, .*; load it with the version that wrote it",
         **loading(editing(lambda text: text.pop("version")))),
    Kind("a state whose text is cut off", error=ValueError, message=DAMAGED, **loading(cut_json)),
    Kind("a state whose text is a number", error=WRONG, message=DAMAGED, **loading(foreign_name)),
    Kind("a state without 'state'", error=WRONG, message=DAMAGED, **loading(without("state"))),
    Kind("a state without 'param_groups'", error=WRONG, message=DAMAGED,
         **loading(without("param_groups"))),
    Kind("a state that is None", error=WRONG, message=DAMAGED, **loading(lambda state: None)),
    Kind("a state that is a list", error=WRONG, message=DAMAGED, **loading(lambda state: [state])),
    Kind("a state with more groups", error=ValueError,
         message="different number of parameter groups", **loading(more_groups)),
    Kind("a state without groups", error=ValueError,
         message="different number of parameter groups", **loading(no_groups)),
    Kind("a state with fewer parameters", error=ValueError,
         message="doesn't match the size of optimizer's group", **loading(fewer_parameters)),
    Kind("a state of other shapes", error=ValueError, fits=own,
         message=r"has shape \(7,\) where the parameter has .*; the state is of another model",
         fixed={"steps": (1, 2, 3)}, **loading(other_shapes)),
    Kind("a state that lacks what a transform keeps", error=ValueError, message=DAMAGED,
         fits=counting, **loading(each_transform(lambda entry: entry["state"].clear()))),
    Kind("a state without a transform's state", error=ValueError, message=DAMAGED, fits=counting,
         **loading(each_transform(lambda entry: entry.pop("state")))),
    Kind("a state whose generator is cut off", error=ValueError, message=DAMAGED, fits=drawing,
         **loading(each_transform(cut_generator))),
    Kind("a state of an unknown dtype", error=ValueError, message=DAMAGED, fits=own,
         **loading(each_transform(lambda entry: entry["state"]["matrix"].update(dtype="float1")))),
    Kind("the optimizer's own state", error=None, outcome="works", but=RATES,
         **loading(lambda state: state)),
    Kind("the state of a bare optimizer", error=None, outcome="works", but=RATES, fits=stateless,
         **loading(bare)),
    Kind("a load hook raises", pre_hook, KeyError, "load hook",
         but=frozenset({"text in the groups"})),
    Kind("a save hook raises", save_hook, KeyError, "save hook"),
    Kind("a transform's state that cannot be saved", lambda world: world.optimizer.state_dict(),
         TypeError, "the state '.*' of .* holds a object.*; it may hold numbers, strings, tensors",
         prepare=unserialisable, fits=own),
]  # fmt: skip
