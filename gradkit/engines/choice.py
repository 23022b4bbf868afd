"""Which engine fits a model and its parameters."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradkit.flat import Layout

EngineName = Literal["auto", "functional", "inplace"]
ENGINES: tuple[EngineName, ...] = ("auto", "functional", "inplace")


class ParameterPlaces:
    """Where the parameters of a layout are in the model, looked up once per layout."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        # A module that is registered at several places is visited once; a parameter that several
        # modules share has one place in each of them.
        places: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    places.setdefault(id(parameter), []).append((name, module, key))
        self._places = [places.get(id(parameter), []) for parameter in layout.parameters]
        self.missing = [index for index, found in enumerate(self._places) if not found]
        self.layout = layout
        self._model = model
        self.modules = list(model.modules())
        self.writes_weights = any(
            getattr(module, "max_norm", None) is not None for module in model.modules()
        )
        """Whether an embedding with `max_norm` changes its weight in forward."""
        self._look_beside()

    def _look_beside(self) -> None:
        """Find the parameters beside the optimised ones, with and without a gradient, as of now."""
        own = set(map(id, self.layout.parameters))
        found: dict[int, nn.Parameter] = {
            id(parameter): parameter
            for module in self.modules
            for parameter in module._parameters.values()
            if parameter is not None and id(parameter) not in own
        }
        self.others = [each for each in found.values() if each.requires_grad]
        self.frozen = [each for each in found.values() if not each.requires_grad]

    def name(self, index: int) -> str:
        """The model's first name for a parameter."""
        return self._places[index][0][0]

    def check_current(self) -> None:
        """Check that the model still holds these very parameters.

        Raises:
            RuntimeError: If one has been replaced since.
        """
        self.modules = list(self._model.modules())
        self._look_beside()
        present = set(map(id, self.modules))
        for places, parameter in zip(self._places, self.layout.parameters, strict=True):
            for name, owner, key in places:
                if id(owner) not in present or owner._parameters.get(key) is not parameter:
                    raise RuntimeError(
                        f"the model's parameter {name!r} is no longer the one that the optimizer "
                        "holds, so stepping would not change the model; make a new optimizer and "
                        "wrap that"
                    )


def choose_engine(
    wanted: EngineName, places: ParameterPlaces | None, layout: Layout
) -> Literal["functional", "inplace"]:
    """The engine to use: the wanted one, or the functional one where its needs are met.

    Raises:
        ValueError: If the functional engine is wanted and something it needs is missing.
    """
    if wanted == "inplace":
        return "inplace"
    problem = _functional_problem(places, layout)
    if problem is None:
        return "functional"
    if wanted == "functional":
        raise ValueError(f"engine='functional' {problem}; or pass engine='inplace'")
    return "inplace"


def _functional_problem(places: ParameterPlaces | None, layout: Layout) -> str | None:
    if places is None:
        return "runs closures on a copy of the model's parameters: pass model= to gk.wrap()"
    if places.missing:
        index = places.missing[0]
        shape = tuple(layout.parameters[index].shape)
        return (
            f"needs every optimised parameter to be the model's, but parameter {index} of the "
            f"optimizer (group {layout.groups[index]}, shape {shape}) is not: pass as model= a "
            "module that holds them all"
        )
    if layout.shards is not None:
        return "cannot run closures on other parameters than the shards that the model holds"
    for module in places.modules:
        if "_orig_mod" in module._modules:
            return "cannot replace the parameters of a compiled module: pass the original as model="
        if isinstance(module, DistributedDataParallel):
            return (
                "cannot replace the parameters of a DistributedDataParallel module: pass its "
                ".module as model= and the ranks as process_group="
            )
    if places.writes_weights:
        return "would lose what an embedding with max_norm= writes to its weight in forward"
    for index, parameter in enumerate(layout.parameters):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            name = places.name(index)
            return f"would not run the hooks registered on the parameter {name!r}: remove them"
    return None
