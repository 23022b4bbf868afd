"""What happens to the model or the parameters between steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from faults.case import NETWORKS
from faults.kind import Kind
from faults.world import World


def replaced_parameter(world: World) -> Callable[[], object]:
    head, old = world.model.head, world.model.head.weight
    head.weight = nn.Parameter(torch.zeros_like(old))

    def repair() -> None:
        head.weight = old

    return repair


def replaced_module(world: World) -> Callable[[], object]:
    old = world.model.head
    with torch.random.fork_rng(devices=[]):
        world.model.head = nn.Linear(3, 2).to(world.case.dtype)

    def repair() -> None:
        world.model.head = old

    return repair


def moved_to_meta(world: World) -> Callable[[], object]:
    held = [(h, dict(h)) for m in world.model.modules() for h in (m._parameters, m._buffers)]
    world.model.to("meta")

    def repair() -> None:
        for where, old in held:
            where.clear()
            where.update(old)

    return repair


def new_data(change: Callable[[Tensor], Tensor]) -> Callable[[World], Callable[[], object]]:
    """Exchange the data of a parameter that no forward looks at the shape of."""

    def prepare(world: World) -> Callable[[], object]:
        parameter = world.model.head.bias
        old, grad = parameter.data, parameter.grad
        parameter.grad = None
        parameter.data = change(old)

        def repair() -> None:
            parameter.data = old
            parameter.grad = grad

        return repair

    return prepare


def doubled(world: World) -> Callable[[], object]:
    world.model.double()

    def repair() -> None:
        world.model.float()
        if world.case.extras:
            world.model._buffers["shared"] = world.model.count

    return repair


def new_group(make: Callable[[], Tensor]) -> Callable[[World], Callable[[], object]]:
    """Add a parameter group."""

    def prepare(world: World) -> Callable[[], object]:
        world.optimizer.add_param_group({"params": [make()]})
        return lambda: world.base.param_groups.pop()

    return prepare


def same_again(world: World) -> object:
    world.optimizer.add_param_group({"params": [world.model.head.weight]})


def hooked(world: World) -> Callable[[], object]:
    return world.model.head.weight.register_hook(lambda gradient: None).remove


@torch.no_grad()
def nan_weight(world: World) -> Callable[[], object]:
    bias = world.model.head.bias
    old = bias.clone()
    bias[0] = torch.nan

    def repair() -> None:
        bias.data.copy_(old)

    return repair


STATEFUL = {"base": ("momentum", "adam", "adamw", "rmsprop", "adagrad"), "steps": (1, 2, 3)}

KINDS = [
    Kind("a parameter is replaced in the model", World.step, RuntimeError,
         "'head.weight' is no longer the one .*; make a new optimizer and wrap that",
         prepare=replaced_parameter),
    Kind("a module is replaced in the model", World.step, RuntimeError,
         "'head.weight' is no longer the one .*; make a new optimizer and wrap that",
         prepare=replaced_module),
    Kind("the model is moved to another device", World.step, RuntimeError,
         "is no longer the one .*; make a new optimizer and wrap that",
         prepare=moved_to_meta,
         fixed={"network": tuple(name for name in NETWORKS if name != "recurrent")}),
    Kind("a parameter changes its shape", World.step, (ValueError, RuntimeError),
         "shape.*make a new optimizer", prepare=new_data(lambda old: old[:1].clone()),
         fixed=STATEFUL),
    Kind("the model changes its dtype", World.step, (ValueError, RuntimeError),
         "dtype.*make a new optimizer", prepare=doubled,
         fixed={**STATEFUL, "dtype": (torch.float32,), "base": ("adam", "adamw", "rmsprop")}),
    Kind("a parameter becomes complex", World.step, ValueError,
         r"is complex .*keep it as torch.view_as_real", prepare=new_data(lambda old: old * 1j)),
    Kind("a new group on the meta device", World.step, ValueError, "meta device",
         prepare=new_group(lambda: nn.Parameter(torch.ones(2, device="meta")))),
    Kind("a new group with a complex parameter", World.step, ValueError,
         r"is complex .*keep it as torch.view_as_real",
         prepare=new_group(lambda: nn.Parameter(torch.ones(2, dtype=torch.cfloat)))),
    Kind("a new group that is not initialised", World.step, ValueError,
         "not initialised yet; run one forward of the lazy module",
         prepare=new_group(UninitializedParameter)),
    Kind("a new group with a parameter that the model lacks", World.step, ValueError,
         r"engine='functional' needs every optimised parameter.*pass as model= a module that holds",
         prepare=new_group(lambda: nn.Parameter(torch.ones(2))), fixed={"engine": ("functional",)}),
    Kind("a group with a parameter that is there already", same_again, ValueError,
         "more than one parameter group"),
    Kind("a parameter hook", World.step, ValueError,
         "hooks registered on the parameter 'head.weight': remove them; or pass engine='inplace'",
         prepare=hooked, fixed={"engine": ("functional",)}),
    Kind("a weight that is NaN", World.step, RuntimeError,
         r"the loss of objective '\w+' is nan.*nothing was changed.*pass nonfinite='skip'",
         outcome="nonfinite", prepare=nan_weight),
]  # fmt: skip
