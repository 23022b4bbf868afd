"""Which engine fits a model and its parameters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from gradkit.flat import Layout

EngineName = Literal["auto", "functional", "inplace"]
ENGINES: tuple[EngineName, ...] = ("auto", "functional", "inplace")


class ParameterNames:
    """The model's names for the parameters of a layout, looked up once per layout."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        places = {
            id(parameter): (f"{prefix}.{name}" if prefix else name, module, name)
            for prefix, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        found = [places.get(id(parameter)) for parameter in layout.parameters]
        self.missing = [index for index, place in enumerate(found) if place is None]
        self._places = [place for place in found if place is not None]
        self.names = [name for name, _, _ in self._places]
        self.layout = layout
        own = set(map(id, layout.parameters))
        self.others = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and id(parameter) not in own
        ]

    def check_current(self) -> None:
        """Check that the model still holds these very parameters.

        Raises:
            RuntimeError: If one has been replaced since.
        """
        parameters = self.layout.parameters
        if self.missing:
            return
        for (name, owner, key), parameter in zip(self._places, parameters, strict=True):
            if owner._parameters.get(key) is not parameter:
                raise RuntimeError(
                    f"the model's parameter {name!r} is no longer the one that the optimizer "
                    "holds, so stepping would not change the model; make a new optimizer and "
                    "wrap that"
                )


def choose_engine(
    wanted: EngineName, model: nn.Module | None, names: ParameterNames | None, layout: Layout
) -> Literal["functional", "inplace"]:
    """The engine to use: the wanted one, or the functional one where its needs are met.

    Raises:
        ValueError: If the functional engine is wanted and something it needs is missing.
    """
    if wanted == "inplace":
        return "inplace"
    problem = _functional_problem(model, names, layout)
    if problem is None:
        return "functional"
    if wanted == "functional":
        raise ValueError(f"engine='functional' {problem}; or pass engine='inplace'")
    return "inplace"


def _functional_problem(
    model: nn.Module | None, names: ParameterNames | None, layout: Layout
) -> str | None:
    if model is None or names is None:
        return "runs closures on a copy of the model's parameters: pass model= to gk.wrap()"
    if names.missing:
        index = names.missing[0]
        shape = tuple(layout.parameters[index].shape)
        return (
            f"needs every optimised parameter to be the model's, but parameter {index} of the "
            f"optimizer (group {layout.groups[index]}, shape {shape}) is not: pass as model= a "
            "module that holds them all"
        )
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        return "cannot replace the parameters of a compiled module: pass the original as model="
    for name, parameter in zip(names.names, layout.parameters, strict=True):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"would not run the hooks registered on the parameter {name!r}: remove them"
    return None


def refuse_processes() -> None:
    """Check that this is the only process of its group.

    Raises:
        RuntimeError: If it is not: gradients of several objectives would silently stay local.
    """
    distributed = torch.distributed
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            f"the process group has {distributed.get_world_size()} ranks; this version of gradkit "
            "steps in one process only, because gradients that are not reduced over all ranks "
            "would make the ranks drift apart"
        )
