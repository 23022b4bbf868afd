"""The state of transforms, saved inside the base optimizer's state dict.

Checkpoint formats agree on little more than the base optimizer's own keys, so no top-level key is
added. The small state of all transforms is one JSON string in the first parameter group. Flat
vectors are split by parameter and kept in each parameter's state, under names that begin with
"gradkit.". Tensors of any shape ("gradkit.0:teacher.weight") are kept there, too.

Some base optimizers, such as some that wrap another one, have a state dict of a different form.
For these only, everything is saved beside it, under the key "gradkit".
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkit.core.context import checked_state
from gradkit.core.flat import Layout
from gradkit.core.ranks import as_part_of, is_sharded, local
from gradkit.core.transform import Transform

KEY = "gradkit"
PREFIX = "gradkit."
# Prefix, in a state dict only, for the vector of a parameter that the base has not stepped yet.
_UNSTEPPED = "unstepped."
_VERSION = 1
# The attribute of a base optimizer whose state dict has a form of its own.
_STORE = "_gradkit_vectors"

# State by parameter; some optimizers use other keys and values.
Store = MutableMapping[Any, Any]


def has_own_form(base: Optimizer) -> bool:
    """Whether a base optimizer's state dict has another form than torch's.

    Raises:
        ValueError: If the state dict is not a mapping, so that nothing can be saved in it.
    """
    if type(base).state_dict is Optimizer.state_dict:
        return False
    try:
        saved: object = base.state_dict()
    except RuntimeError:  # on one of several ranks, before the ranks' state has been collected
        return True
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"the state dict of the base optimizer, a {type(base).__name__}, is a "
            f"{type(saved).__name__}, so that transforms can save nothing in it; wrap the "
            "optimizers inside it one by one"
        )
    groups, places = saved.get("param_groups"), 0
    if not isinstance(saved.get("state"), Mapping) or not isinstance(groups, Sequence):
        return True
    for group in groups:
        if list(group["params"]) != list(range(places, places + len(group["params"]))):
            return True
        places += len(group["params"])
    return False


def give_store(base: Optimizer, store: Store) -> None:
    """Keep transforms' vectors beside the state of a base whose state dict has its own form."""
    setattr(base, _STORE, store)


def own_store(base: Optimizer) -> Store:
    """The state that shows transforms' vectors: the base optimizer's, or a store beside it."""
    store: Store | None = getattr(base, _STORE, None)
    return base.state if store is None else store


def _entry(store: Store, parameter: Tensor) -> MutableMapping[str, Any] | None:
    try:
        entry: MutableMapping[str, Any] | None = store[parameter]
        return entry
    except KeyError:  # a plain dict, in which only the base optimizer adds entries
        return None


@dataclass(frozen=True)
class Saved:
    """The parts of a state dict.

    Attributes:
        theirs: The base optimizer's part.
        text: The JSON text of the transforms' small state; None if there is none.
        vectors: The transforms' vectors and tensors, by parameter id.
        groups: The saved parameter groups.
    """

    theirs: dict[str, Any]
    text: str | None
    vectors: Mapping[Any, MutableMapping[str, Tensor]]
    groups: Sequence[Mapping[str, Any]]


def encode(transforms: Sequence[Transform], *, marks: bool = False) -> str:
    """The transforms' names, small state and generators as JSON, without loss of precision.

    Ranks compare this text in each step.

    Args:
        transforms: The transforms.
        marks: Whether to include their fingerprints (`Transform.mark`), which is needed for saving
            only.

    Raises:
        TypeError: If a transform's state holds a value that cannot be saved.
    """
    chain = [
        {
            "name": transform.saved_name,
            "state": {
                name: _packed(checked_state(transform, name, value))
                for name, value in transform.state.items()
            },
            "generator": (
                None if transform.generator is None else _packed(transform.generator.get_state())
            ),
            **({"mark": transform.mark()} if marks else {}),
        }
        for transform in transforms
    ]
    return json.dumps({"version": _VERSION, "transforms": chain})


def check(text: str, transforms: Sequence[Transform]) -> None:
    """Check that saved state fits these transforms.

    Raises:
        ValueError: If it is of a different chain or format, damaged or incomplete.
    """
    try:
        saved = json.loads(text)
        damaged = not isinstance(saved, dict)
    except (ValueError, TypeError):
        damaged = True
    if damaged:
        raise ValueError("the saved state of the transforms is damaged; load another checkpoint")
    if saved.get("version") != _VERSION:
        raise ValueError(
            f"the saved state has format {saved.get('version')!r}, and this version of gradkit "
            f"reads format {_VERSION}; load it with the version that wrote it"
        )
    here = [transform.saved_name for transform in transforms]
    there = [entry["name"] for entry in saved["transforms"]]
    if here != there:
        raise ValueError(
            f"the saved state is of the transforms ({', '.join(there) or 'none'}), but this "
            f"optimizer has ({', '.join(here) or 'none'}); wrap the same ones in the same "
            "order. To go on with others, load it there, and then wrap that optimizer's base again"
        )
    for transform, entry in zip(transforms, saved["transforms"], strict=True):
        name = transform.saved_name
        try:
            values = _small_state(entry, transform)
            if transform.generator is not None and entry["generator"] is not None:
                torch.Generator().set_state(_unpacked(entry["generator"]))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the saved state of {name} is damaged; load another checkpoint"
            ) from error
        missing = [key for key in transform.__dict__.get("_required", ()) if key not in values]
        if missing:
            raise ValueError(
                f"the saved state of {name} is incomplete: it lacks {missing[0]!r}; load another "
                "checkpoint"
            )


def drop_earlier(transforms: Sequence[Transform], base: Optimizer) -> bool:
    """Remove what an earlier wrapper, or a state dict loaded into the base, has left in its state.

    Returns:
        Whether these transforms, which start anew, could have gone on with it.
    """
    vectors = False
    for held in own_store(base).values():
        for key in [key for key in held if is_own(key)] if isinstance(held, dict) else ():
            del held[key]
            vectors = True
    text = base.param_groups[0].get(KEY)
    if text is None:
        return False
    try:
        check(text, transforms)
    except ValueError:
        return False
    earlier, fresh = (json.loads(each)["transforms"] for each in (text, encode(transforms)))
    return vectors or any(
        was[part] != now[part]
        for was, now in zip(earlier, fresh, strict=True)
        for part in ("state", "generator")
    )


def decode(text: str, transforms: Sequence[Transform]) -> None:
    """Load the state that `encode` wrote into the transforms; call `check` before."""
    for transform, entry in zip(transforms, json.loads(text)["transforms"], strict=True):
        values = _small_state(entry, transform)
        transform.state.clear()
        transform.state.update(values)
        if transform.generator is not None and entry["generator"] is not None:
            transform.generator.set_state(_unpacked(entry["generator"]))


def _small_state(entry: Mapping[str, Any], transform: Transform) -> dict[str, Any]:
    return transform.completed({key: _unpacked(value) for key, value in entry["state"].items()})


def _packed(value: Any) -> Any:
    """A value as JSON, without loss of precision."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, (list, tuple)):
        return [_packed(item) for item in value]
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return {
        "tensor": base64.b64encode(data.numpy().tobytes()).decode("ascii"),
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
    }


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float.fromhex(value["float"])
    data = bytearray(base64.b64decode(value["tensor"]))
    dtype = getattr(torch, value["dtype"])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(value["shape"]).clone()


def link_vectors(
    transforms: Sequence[Transform],
    layout: Layout,
    base: torch.optim.Optimizer,
    where: Callable[[Tensor, str], bool],
) -> None:
    """Show the transforms' flat vectors in the state of each parameter for which `where` holds.

    They are views, so they are linked only once. Parameters that the base has not stepped yet must
    not be linked, since many optimizers initialise their state only where it is empty.
    """
    store = own_store(base)
    for key, vector in _keyed(transforms):
        for parameter, view in zip(layout.parameters, layout.views(vector), strict=True):
            held = _entry(store, parameter) if where(parameter, key) else None
            if held is not None:
                held[key] = as_part_of(view, parameter)


def link_stepped(
    transforms: Sequence[Transform], layout: Layout, base: torch.optim.Optimizer
) -> None:
    """Link the vectors and tensors of parameters that the base has just stepped."""
    store = own_store(base)

    def is_new(parameter: Tensor, key: str) -> bool:
        return parameter.grad is not None and key not in (_entry(store, parameter) or ())

    if any(transform.vectors for transform in transforms):
        link_vectors(transforms, layout, base, is_new)
    if all(type(transform).tensors is Transform.tensors for transform in transforms):
        return
    stepped = [parameter for parameter in layout.parameters if parameter.grad is not None]
    if all(any(map(_tensor_key, store.get(parameter) or ())) for parameter in stepped):
        return
    for key, parameter, tensor in _placed(transforms, base.param_groups):
        held = _entry(store, parameter) if is_new(parameter, key) else None
        if held is not None:
            held[key] = tensor


def relink(transforms: Sequence[Transform], layout: Layout, base: torch.optim.Optimizer) -> None:
    """Replace the views in the state after vectors have been reallocated."""
    store = own_store(base)
    link_vectors(
        transforms, layout, base, lambda parameter, key: key in (store.get(parameter) or ())
    )
    renew_tensors(transforms, base)


def renew_tensors(
    transforms: Sequence[Transform],
    base: torch.optim.Optimizer,
    stepped: Sequence[Tensor] = (),
) -> None:
    """Show the transforms' present tensors in the state of stepped parameters.

    Args:
        transforms: The transforms.
        base: The base optimizer.
        stepped: Parameters that are known to have been stepped although their state is empty.
    """
    store = own_store(base)
    held = {key for key, state in store.items() if state and isinstance(state, Mapping)}
    held.update(stepped)
    for parameter in held:
        state = store.get(parameter) or {}
        for key in [key for key in state if _tensor_key(key) is not None]:
            del state[key]
    for key, parameter, tensor in _placed(transforms, base.param_groups):
        entry = _entry(store, parameter) if parameter in held else None
        if entry is not None:
            entry[key] = tensor


def lay_out_vectors(
    transforms: Sequence[Transform],
    old: Layout | None,
    new: Layout,
    base: torch.optim.Optimizer,
    loaded: Mapping[Tensor, Mapping[str, Tensor]] | None = None,
) -> None:
    """Make the transforms' flat vectors for a new layout.

    Each parameter's part is, in this order of preference, what was loaded for it, its value in the
    old layout, the value kept in its state from before it was frozen, or the value in
    `initial_vectors`.
    """
    store = own_store(base)
    for number, transform in enumerate(transforms):
        with torch.no_grad():
            fresh = transform.initial_vectors(new)
        for name, vector in fresh.items():
            key = f"{PREFIX}{number}.{name}"
            before: dict[Tensor, Tensor] = {}
            if old is not None and name in transform.vectors:
                parts = old.views(transform.vectors[name])
                before = dict(zip(old.parameters, parts, strict=True))
            with torch.no_grad():
                for parameter, view in zip(new.parameters, new.views(vector), strict=True):
                    sources = (
                        (loaded or {}).get(parameter, {}).get(key),
                        before.get(parameter),
                        (store.get(parameter) or {}).get(key),
                    )
                    for source in sources:
                        if source is not None:
                            view.copy_(local(source))
                            break
        transform.vectors.clear()
        transform.vectors.update(fresh)
    relink(transforms, new, base)


def add_unlinked_vectors(
    state_dict: dict[str, Any],
    transforms: Sequence[Transform],
    layout: Layout,
    param_groups: Sequence[Mapping[str, Any]],
) -> None:
    """Add to a state dict the vectors of parameters that the base has not stepped yet."""
    known = identities(param_groups, state_dict["param_groups"])
    for key, vector in _keyed(transforms):
        for parameter, view in zip(layout.parameters, layout.views(vector), strict=True):
            state = state_dict["state"].get(known[parameter], {})
            if key not in state:
                part = as_part_of(view, parameter)
                state_dict["state"][known[parameter]] = {**state, _UNSTEPPED + key: part}


def add_unlinked_tensors(
    state_dict: dict[str, Any],
    transforms: Sequence[Transform],
    param_groups: Sequence[Mapping[str, Any]],
) -> None:
    """Add to a state dict the tensors of parameters that the base has not stepped yet."""
    known = identities(param_groups, state_dict["param_groups"])
    for key, parameter, tensor in _placed(transforms, param_groups):
        state = state_dict["state"].get(known[parameter], {})
        if key not in state:
            state_dict["state"][known[parameter]] = {**state, _UNSTEPPED + key: tensor}


def take_tensors(
    own: Mapping[Any, MutableMapping[str, Any]],
) -> tuple[dict[int, dict[str, Tensor]], set[Any]]:
    """Remove the transforms' tensors from the vectors that `split` returned.

    Returns:
        The tensors by transform and name, and the ids of the stepped parameters that held them.
    """
    taken: dict[int, dict[str, Tensor]] = {}
    stepped: set[Any] = set()
    for identity, state in own.items():
        for key in list(state):
            place = _tensor_key(key.removeprefix(_UNSTEPPED))
            if place is not None:
                value = state.pop(key)
                # A flattened checkpoint that lacks it has an empty mapping instead.
                if isinstance(value, Tensor):
                    taken.setdefault(place[0], {})[place[1]] = value
                    if not key.startswith(_UNSTEPPED):
                        stepped.add(identity)
    return taken, stepped


def check_tensors(
    tensors: Mapping[int, Mapping[str, Tensor]], transforms: Sequence[Transform]
) -> None:
    """Check that saved tensors fit the transforms.

    Raises:
        ValueError: If a transform cannot load its tensors.
    """
    for number, transform in enumerate(transforms):
        transform.check_tensors(tensors.get(number, {}))


def load_tensors(
    tensors: Mapping[int, Mapping[str, Tensor]],
    text: str | None,
    transforms: Sequence[Transform],
) -> None:
    """Load saved tensors, and the fingerprints of what is saved elsewhere, into the transforms."""
    entries = [] if text is None else json.loads(text)["transforms"]
    for number, transform in enumerate(transforms):
        mark = entries[number].get("mark") if entries else None
        transform.load_tensors(tensors.get(number, {}), mark)


def beside(
    transforms: Sequence[Transform],
    layout: Layout | None,
    base: Optimizer,
) -> dict[str, Any]:
    """The transforms' state, to be saved beside a state dict of the base optimizer's own form."""
    store = own_store(base)
    every = [parameter for group in base.param_groups for parameter in group["params"]]
    vectors = {parameter: dict(store.get(parameter) or {}) for parameter in every}
    if layout is not None:
        for key, vector in _keyed(transforms):
            for parameter, view in zip(layout.parameters, layout.views(vector), strict=True):
                vectors[parameter][key] = as_part_of(view, parameter)
    for key, parameter, tensor in _placed(transforms, base.param_groups):
        vectors[parameter][key] = tensor
    return {
        "transforms": encode(transforms, marks=True),
        "vectors": [vectors[each] for each in every],
    }


def split_beside(state_dict: Mapping[str, Any], base: Optimizer) -> Saved:
    """Split a state dict of the base optimizer's own form.

    Raises:
        ValueError: If it was saved for another number of parameters.
    """
    theirs = dict(state_dict)
    own = theirs.pop(KEY, None)
    counts = [len(group["params"]) for group in base.param_groups]
    if own is None:
        return Saved(theirs, None, {}, [{"params": [None] * count} for count in counts])
    vectors = {number: dict(each) for number, each in enumerate(own["vectors"])}
    if len(vectors) != sum(counts):
        raise ValueError(
            f"the saved state is of {len(vectors)} parameters and the optimizer has {sum(counts)}; "
            "the state is of another model"
        )
    positions = iter(range(len(vectors)))
    groups = [{"params": [next(positions) for _ in range(count)]} for count in counts]
    return Saved(theirs, own["transforms"], vectors, groups)


def split(state_dict: Mapping[str, Any]) -> Saved:
    """Split a state dict of torch's form; keys that a base has added stay in the base's part."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    text = groups[0].pop(KEY, None) if groups else None
    own: dict[Any, dict[str, Tensor]] = {}
    theirs: dict[Any, Any] = {}
    for identity, state in state_dict["state"].items():
        if not isinstance(state, Mapping):  # some optimizers keep one number for all parameters
            theirs[identity] = state
            continue
        kept = dict(state)
        own[identity] = {key: kept.pop(key) for key in state if is_own(key)}
        if kept or not own[identity]:
            theirs[identity] = kept
    return Saved({**state_dict, "state": theirs, "param_groups": groups}, text, own, groups)


def check_vectors(
    param_groups: Sequence[Mapping[str, Any]],
    own: Mapping[Any, Mapping[str, Tensor]],
    saved_groups: Sequence[Mapping[str, Any]],
) -> None:
    """Check that saved vectors have the shapes of the parameters in the same places.

    Groups of other sizes are not checked, since the base optimizer refuses them.

    Raises:
        ValueError: If a shape differs, or if only one of vector and parameter is sharded.
    """
    for group, saved in zip(param_groups, saved_groups, strict=False):
        for parameter, identity in zip(group["params"], saved["params"], strict=False):
            for key, value in own.get(identity, {}).items():
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"the saved {key!r} has shape {tuple(value.shape)} where the parameter "
                        f"has {tuple(parameter.shape)}; the state is of another model"
                    )
                if is_sharded(value) != is_sharded(parameter):
                    raise ValueError(
                        f"the saved {key!r} is {'sharded' if is_sharded(value) else 'whole'} and "
                        "the parameter is not; save and load by torch.distributed.checkpoint, "
                        "which shards it anew"
                    )


def store_vectors(
    param_groups: Sequence[Mapping[str, Any]],
    own: Mapping[Any, Mapping[str, Tensor]],
    saved_groups: Sequence[Mapping[str, Any]],
    base: torch.optim.Optimizer,
) -> dict[Tensor, dict[str, Tensor]]:
    """Saved vectors by parameter; those of stepped parameters are also put into their state."""
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    for group, saved in zip(param_groups, saved_groups, strict=True):
        for parameter, identity in zip(group["params"], saved["params"], strict=True):
            for key, value in own.get(identity, {}).items():
                loaded.setdefault(parameter, {})[key.removeprefix(_UNSTEPPED)] = value
                held = None if key.startswith(_UNSTEPPED) else _entry(own_store(base), parameter)
                if held is not None:
                    held[key] = value
    return loaded


def _keyed(transforms: Sequence[Transform]) -> Iterator[tuple[str, Tensor]]:
    for number, transform in enumerate(transforms):
        for name, vector in transform.vectors.items():
            yield f"{PREFIX}{number}.{name}", vector


def _placed(
    transforms: Sequence[Transform], param_groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The transforms' tensors: the key, the parameter whose state shows it, and the tensor.

    Tensors that belong to no optimised parameter are shown in the first parameter's state.
    """
    found = [transform.tensors() for transform in transforms]
    if not any(found):
        return
    every = [parameter for group in param_groups for parameter in group["params"]]
    trained = dict.fromkeys(parameter for parameter in every if parameter.requires_grad)
    first = next(iter(trained or every), None)
    if first is None:
        return
    for number, tensors in enumerate(found):
        for name, (parameter, tensor) in tensors.items():
            place = parameter if parameter is not None and parameter in trained else first
            yield f"{PREFIX}{number}:{name}", place, tensor


def _tensor_key(key: object) -> tuple[int, str] | None:
    """The transform's position and the tensor's name, from a key; None for other keys."""
    number, colon, name = str(key).removeprefix(PREFIX).partition(":")
    if not (str(key).startswith(PREFIX) and colon and number.isdecimal()):
        return None
    return int(number), name


def identities(
    param_groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, Any]:
    """Each parameter's id in a state dict's groups."""
    return {
        parameter: identity
        for group, saved in zip(param_groups, saved_groups, strict=True)
        for parameter, identity in zip(group["params"], saved["params"], strict=True)
    }


def is_own(key: object) -> bool:
    """Whether a key of a parameter's state belongs to a transform."""
    return str(key).startswith((PREFIX, _UNSTEPPED + PREFIX))
