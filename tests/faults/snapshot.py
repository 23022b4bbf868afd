"""Everything that a fault must leave as it was: by value, bit for bit, and as objects."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from faults.world import World


class Same:
    """Equal to what holds the very same object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def bits(value: Any) -> Any:
    """A value in a form whose equality is that of every bit: NaN is NaN, and −0 is not 0."""
    if isinstance(value, Tensor):
        what = (str(value.dtype), tuple(value.shape), value.requires_grad)
        if value.is_meta or value.layout != torch.strided:
            return (*what, Same(value))
        # A storage that numpy has seen can no longer be resized, hence the clone.
        data = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return (*what, data.view(torch.uint8).numpy().tobytes())
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return (type(value).__name__, value)


def _weights(module: nn.Module) -> dict[str, Any]:
    return {name: bits(part._parameters) for name, part in module.named_modules()}


def _buffers(module: nn.Module) -> dict[str, Any]:
    return {
        name: (part.training, [(key, bits(value)) for key, value in part._buffers.items()])
        for name, part in module.named_modules()
    }


def _module_objects(module: nn.Module) -> list[Any]:
    return [
        [(key, Same(value)) for key, value in held.items()]
        for part in module.modules()
        for held in (part._parameters, part._buffers)
    ]


def _teachers(world: World) -> list[nn.Module]:
    found = [getattr(transform, "teacher", None) for transform in world.optimizer.transforms]
    return [teacher for teacher in found if teacher is not None]


def _parameters(world: World) -> list[Tensor]:
    held = [parameter for group in world.base.param_groups for parameter in group["params"]]
    return [*held, *world.outside, *(p for t in _teachers(world) for p in t.parameters())]


def _base_state(world: World) -> list[Any]:
    held = [parameter for group in world.base.param_groups for parameter in group["params"]]
    return [
        len(world.base.state),
        *(bits(world.base.state[parameter]) for parameter in held if parameter in world.base.state),
    ]


def _groups(world: World) -> list[dict[str, Any]]:
    return [*world.base.param_groups, *(world.spare.param_groups if world.spare else ())]


def values(world: World) -> dict[str, Any]:
    """All of it, by value."""
    transforms = world.optimizer.transforms
    generators = [transform.generator for transform in transforms]
    return {
        "weights": _weights(world.model),
        "buffers": _buffers(world.model),
        "gradients": [bits(parameter.grad) for parameter in _parameters(world)],
        "optimizer state": _base_state(world),
        "parameter groups": [
            {key: bits(value) for key, value in group.items() if key not in ("params", "gradkit")}
            for group in _groups(world)
        ],
        "transform state": [bits(transform.state) for transform in transforms],
        "transform vectors": [bits(transform.vectors) for transform in transforms],
        "transform generators": [
            None if generator is None else bits(generator.get_state()) for generator in generators
        ],
        "teachers": [(_weights(teacher), _buffers(teacher)) for teacher in _teachers(world)],
        "random numbers": bits(torch.get_rng_state()),
    }


def objects(world: World) -> dict[str, Any]:
    """What must be the very same objects."""
    return {
        "parameters and buffers": _module_objects(world.model),
        "parameters of groups": [
            [Same(parameter) for parameter in group["params"]] for group in world.base.param_groups
        ],
        "gradient objects": [Same(parameter.grad) for parameter in _parameters(world)],
        "text in the groups": [group.get("gradkit") for group in _groups(world)],
        "learning rate objects": [
            Same(group["lr"]) if isinstance(group.get("lr"), Tensor) else None
            for group in world.base.param_groups
        ],
        "teachers' parameters": [_module_objects(teacher) for teacher in _teachers(world)],
        "record of the last step": Same(world.optimizer.last_step),
        "signal handler": Same(signal.getsignal(signal.SIGINT)),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def snapshot(world: World) -> dict[str, Any]:
    """All of it, by value and as objects."""
    return {**values(world), **objects(world)}


def require_equal(
    before: dict[str, Any], after: dict[str, Any], when: str, but: frozenset[str] = frozenset()
) -> None:
    """Check that two snapshots differ in nothing but `but`."""
    changed = [name for name in before if name not in but and before[name] != after[name]]
    assert not changed, f"{', '.join(changed)} changed {when}"
