"""The choice of an engine for a model and its parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradkit.core.flat import Layout

EngineName = Literal["auto", "functional", "inplace"]
ENGINES: tuple[EngineName, ...] = ("auto", "functional", "inplace")


class ParameterPlaces:
    """Where the parameters of a layout are in the model.

    Attributes:
        layout: The layout.
        missing: The positions of parameters that are not in the model.
        modules: The model's modules.
        others: The model's other parameters, which require a gradient.
        frozen: The model's other parameters, which do not require a gradient.
        writes_weights: Whether an embedding with `max_norm` changes its weight in forward.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        self._model = model
        self._places = self._found()
        self.missing = [index for index, found in enumerate(self._places) if not found]
        self.modules = modules_of(model)
        self.writes_weights = any(
            getattr(module, "max_norm", None) is not None for module in model.modules()
        )
        self._keys, self._held = _parameters_of(self.modules)
        self._beside = self._not_optimised()
        self._sort_beside()

    def _found(self) -> list[list[tuple[str, nn.Module, str]]]:
        """Each parameter's places in the model: its name, the module that holds it, its key."""
        # A module that is registered several times is visited once. A parameter that several
        # modules share has one place in each of them.
        places: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for prefix, module in self._model.named_modules():
            for key, parameter in module._parameters.items():  # works for scripted modules, too
                if parameter is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    places.setdefault(id(parameter), []).append((name, module, key))
        return [places.get(id(parameter), []) for parameter in self.layout.parameters]

    def _not_optimised(self) -> list[Tensor]:
        own = set(self.layout.parameters)
        return [each for each in dict.fromkeys(self._held) if each is not None and each not in own]

    def _sort_beside(self) -> None:
        self.others = [each for each in self._beside if each.requires_grad]
        self.frozen = [each for each in self._beside if not each.requires_grad]

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The model's buffers by name; one that is registered several times appears as often."""
        return self._model.named_buffers(remove_duplicate=False)

    def name(self, index: int) -> str:
        """The model's first name for a parameter."""
        return self._places[index][0][0]

    def check_current(self) -> bool:
        """Check that the model still holds the same parameter objects.

        Pruning and parametrizations move a parameter to another place, where it is found again.

        Returns:
            Whether a parameter has moved.

        Raises:
            RuntimeError: If one has been replaced or is gone.
        """
        modules = modules_of(self._model)
        keys, held = _parameters_of(modules)
        moved = False
        as_before = _are_same(modules, self.modules) and _are_same(held, self._held)
        if not as_before or keys != self._keys:
            moved = self._find_moved(modules)
            self.modules, self._keys, self._held = modules, keys, held
            self._beside = self._not_optimised()
        self._sort_beside()
        return moved

    def _find_moved(self, modules: Sequence[nn.Module]) -> bool:
        present = set(map(id, modules))
        moved = [
            (t, name)
            for t, (places, parameter) in enumerate(
                zip(self._places, self.layout.parameters, strict=True)
            )
            for name, owner, key in places
            if id(owner) not in present
            or key not in (held := owner._parameters)
            or held[key] is not parameter
        ]
        if not moved:
            return False
        places = self._found()
        now = dict(self._model.named_parameters(remove_duplicate=False))
        for t, name in moved:
            parameter = self.layout.parameters[t]
            if not places[t] or now.get(name, parameter) is not parameter:
                raise RuntimeError(
                    f"the model's parameter {name!r} is no longer the one that the optimizer "
                    "holds, so stepping would not change the model; make a new optimizer and "
                    "wrap that"
                )
        self._places = places
        return True


def _parameters_of(modules: Sequence[nn.Module]) -> tuple[list[str], list[Tensor | None]]:
    """The modules' own parameters, with the keys under which they are held."""
    held = [module._parameters for module in modules if module._parameters]
    keys = [key for each in held for key in each.keys()]  # noqa: SIM118 # scripted: not iterable
    return keys, [parameter for each in held for parameter in each.values()]


def _are_same(new: Sequence[object], old: Sequence[object]) -> bool:
    return len(new) == len(old) and all(map(operator.is_, new, old))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, each once, in the order of `model.modules()`.

    That method passes each module through as many generators as it is deep inside the model, which
    takes much of a step where modules are small.

    Examples:
        >>> block = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
        >>> model = nn.Sequential(block, nn.Sequential(block, nn.Tanh()))
        >>> modules_of(model) == list(model.modules())
        True
    """
    found: dict[int, nn.Module] = {}
    ahead: list[nn.Module] = [model]
    while ahead:
        module = ahead.pop()
        if id(module) in found:
            continue
        found[id(module)] = module
        children = module._modules
        if children:
            ahead += [child for _, child in reversed(children.items()) if child is not None]
    return list(found.values())


def choose_engine(
    wanted: EngineName, places: ParameterPlaces | None, layout: Layout
) -> Literal["functional", "inplace"]:
    """The engine to use; "auto" is "inplace", which keeps torch's own semantics.

    Raises:
        ValueError: If the functional engine is wanted and cannot be used.
    """
    if wanted != "functional":
        return "inplace"
    problem = _functional_problem(places, layout)
    if problem is not None:
        raise ValueError(f"engine='functional' {problem}; or pass engine='inplace'")
    return "functional"


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
        if isinstance(module, torch.jit.ScriptModule):
            return (
                "cannot replace the parameters of a scripted or traced module: leave it unscripted "
                "while it is trained"
            )
        if isinstance(module, DistributedDataParallel):
            return (
                "cannot replace the parameters of a DistributedDataParallel module: pass its "
                ".module as model= and the ranks as process_group="
            )
    if places.writes_weights:
        return "would lose what an embedding with max_norm= writes to its weight in forward"
    return _parameter_problem(places, layout) or _shared_memory_problem(places, layout)


def _parameter_problem(places: ParameterPlaces, layout: Layout) -> str | None:
    """The first property of a parameter object that a leaf in its place would not have."""
    for index, parameter in enumerate(layout.parameters):
        name = places.name(index)
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"would not run the hooks registered on the parameter {name!r}: remove them"
        if type(parameter) is not nn.Parameter:
            return (
                f"puts plain parameters in the place of the model's, and {name!r} is a "
                f"{type(parameter).__name__}"
            )
        # Attributes of frameworks, such as compilers' notes, begin with an underscore.
        attributes = sorted(key for key in vars(parameter) if not key.startswith("_"))
        if attributes:
            return (
                f"would lose the attribute {attributes[0]!r} of the parameter {name!r}: keep it "
                "on the module"
            )
    return None


def _shared_memory_problem(places: ParameterPlaces, layout: Layout) -> str | None:
    """The first buffer that shares memory with something, from which a copy would be separate."""
    owners: dict[int, str] = {}
    for index, parameter in enumerate(layout.parameters):
        owners.setdefault(parameter.untyped_storage().data_ptr(), f"parameter {places.name(index)}")
    seen: set[int] = set()
    for name, buffer in places.buffers():
        plain = type(buffer) is torch.Tensor and buffer.layout == torch.strided
        if id(buffer) in seen or not (plain and buffer.numel()):
            continue
        seen.add(id(buffer))
        other = owners.setdefault(buffer.untyped_storage().data_ptr(), f"buffer {name}")
        if other != f"buffer {name}":
            return (
                f"runs closures on copies, and the buffer {name!r} shares memory with the "
                f"{other}: register a clone() of it"
            )
    return None
