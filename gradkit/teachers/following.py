"""The update of a teacher's tensors from its student's."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.ranks import is_sharded, local, reshard
from gradkit.core.unwrapping import modules_by_path, unwrapped
from gradkit.teachers.copying import copied, is_writable, joined

Share = Float[Tensor, ""] | float
"""1 - decay: the student's share in the new average."""
Buffers = Literal["copy", "average", "skip"]
"""What a teacher's buffers do: follow the student's, be averaged like weights, or stay."""


def follow(teacher: nn.Module, student: nn.Module, decay: Share) -> None:
    """Move the teacher's weights to decay·teacher + (1 − decay)·student, and copy the rest.

    Tensors are matched by name; see `EMA` for how each kind follows. A decay of 1 does not change
    the teacher. Weights in half precision are averaged in float32 and rounded each time; only `EMA`
    and `GatedEMA` keep the float32 average from step to step.

    Raises:
        ValueError: If the teacher cannot follow; nothing is changed then.

    Examples:
        >>> import torch
        >>> teacher, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> follow(teacher, student, torch.tensor(0.0))
        >>> torch.equal(teacher.weight, student.weight)
        True
    """
    following = Following(teacher, student, remembers=False)
    following.move(following.plan(teacher, student), 1 - decay)


@dataclass(frozen=True, eq=False)
class Pair:
    """A parameter of the teacher, and the student's parameter that it follows.

    Attributes:
        name: The name in the teacher.
        own: The teacher's parameter.
        its: The student's parameter.
    """

    name: str
    own: Tensor
    its: Tensor


@dataclass(eq=False)
class Plan:
    """The update of a teacher, planned and checked before the student moves.

    Attributes:
        teacher: The teacher without wrappers.
        student: The student without wrappers.
        here: The teacher's modules by path; a module may have several paths.
        there: The student's modules by path.
        pairs: The pairs of parameters; each of the teacher's parameters occurs once.
        modules: Copies of the student's modules that the teacher lacks, by path.
        parameters: Copies of the student's parameters that modules of the teacher lack, by name.
    """

    teacher: nn.Module
    student: nn.Module
    here: dict[str, nn.Module]
    there: dict[str, nn.Module]
    pairs: list[Pair]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def device_of(self, its: Tensor) -> torch.device:
        """The teacher's device for a tensor of the student's."""
        moved = (pair.own.device for pair in self.pairs if pair.its.device == its.device)
        return next(moved, its.device)


_WHOLE = (torch.float32, torch.float64)


class Following:
    """The state of a teacher's updates.

    Args:
        teacher: The teacher.
        student: The student.
        remembers: Whether to keep float32 averages from step to step.
        buffers: What buffers do.

    Attributes:
        shadows: The float32 averages of weights of less than 32 bits, by the teacher's names; the
            weight is the rounded average. At a decay of 0.999 most changes are below the resolution
            of the weight itself.

    Raises:
        ValueError: If the teacher cannot follow the student.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        remembers: bool = True,
        buffers: Buffers = "copy",
    ) -> None:
        teacher, student = unwrapped(teacher), unwrapped(student)
        self.remembers = remembers
        self.buffers = buffers
        self.shadows: dict[str, Tensor] = {}
        # Buffers that only one of them had from the start are not changed.
        self._apart = dict(_buffers(teacher)).keys() ^ dict(_buffers(student)).keys()
        self._known: dict[str, tuple[tuple[Any, ...] | None, bool]] = {}
        self._paths = {*modules_by_path(student)}
        self._dtypes = {
            name: buffer.dtype for name, buffer in _buffers(student) if buffer is not None
        }
        if remembers:
            for pair in self.plan(teacher, student).pairs:
                # A copy of a frozen weight needs no average.
                if is_short(pair.own) and not _equal(pair):
                    self.shadow(pair)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # it is keyed by memory addresses

    def plan(self, teacher: nn.Module, student: nn.Module) -> Plan:
        """Match the teacher's tensors with the student's.

        Raises:
            ValueError: If a tensor cannot follow.
        """
        teacher, student = unwrapped(teacher), unwrapped(student)
        here, there = modules_by_path(teacher), modules_by_path(student)
        reshard((*here.values(), *there.values()))
        mine, theirs = _parameters(here), _parameters(there)
        found: dict[int, Pair] = {}
        for name, own in mine.items():
            if name not in theirs:
                raise ValueError(
                    f"the teacher has a parameter {name!r} and the student has none of that name "
                    "any more; make a new teacher of the student as it is now"
                )
            before = found.get(id(own))
            if before is not None and before.its is not theirs[name]:
                raise ValueError(
                    f"the parameters {before.name!r} and {name!r} are one in the teacher and two "
                    "in the student; make a new teacher of the student as it is now"
                )
            if before is None:
                found[id(own)] = Pair(name, own, theirs[name])
        pairs = [pair for pair in found.values() if not self._is_shared(pair)]
        plan = Plan(teacher, student, here, there, pairs)
        self._adopt(plan, [name for name in theirs if name not in mine], theirs)
        return plan

    def _is_shared(self, pair: Pair) -> bool:
        """Whether teacher and student share a weight on purpose; also checks that the pair fits."""
        facts = _facts(pair)
        known = self._known.get(pair.name)
        if known is None or facts is None or known[0] != facts:
            shared = _is_shared(pair)
            if not shared:
                _check(pair)
            known = self._known[pair.name] = (facts, shared)
        return known[1]

    def _adopt(self, plan: Plan, missing: Sequence[str], theirs: dict[str, nn.Parameter]) -> None:
        """Copy the modules and parameters that the student got after the teacher was made."""
        there, modules = plan.here, plan.there
        new = [path for path in modules if path not in there and path not in self._paths]
        new += [path for path in (name.rpartition(".")[0] for name in missing) if path not in there]
        if not (new or missing):
            return
        memo: dict[int, Any] = {id(pair.its): pair.own for pair in plan.pairs}
        roots = []
        for path in dict.fromkeys(new):
            while path.rpartition(".")[0] not in there:
                path = path.rpartition(".")[0]
            roots.append(path)
        for what in (*roots, *missing):
            whole = what in theirs and is_sharded(theirs[what])
            parent = there.get(what.rpartition(".")[0])
            if whole or isinstance(parent, torch.jit.ScriptModule):
                raise ValueError(
                    f"the student has got {what!r} since the teacher was made, and the teacher is "
                    f"{'sharded' if whole else 'scripted'} and cannot be given a copy; make a new "
                    "teacher of the student as it is now"
                )
        for path in dict.fromkeys(roots):
            plan.modules[path] = copied(modules[path], memo)
        for name in missing:
            if not any(name.startswith(f"{path}.") for path in plan.modules):
                its = theirs[name]
                if id(its) not in memo:
                    memo[id(its)] = nn.Parameter(its.detach().clone(), requires_grad=False)
                plan.parameters[name] = memo[id(its)]

    @torch.no_grad()
    def move(self, plan: Plan, share: Share) -> None:
        """Move the teacher by `share` of the way to the student, which has already been updated.

        All memory is allocated before the first change.
        """
        reshard((*plan.here.values(), *plan.there.values()))
        if not isinstance(share, Tensor) and share == 0:
            return
        added = self._added(plan)
        writes = _Writes(share)
        with torch._C.DisableTorchFunctionSubclass():
            for pair in plan.pairs:
                self._prepare(pair, writes)
        dtypes: dict[str, torch.dtype] = {}
        exchanges = self._prepare_buffers(plan, writes, dtypes)
        with torch._C.DisableTorchFunctionSubclass():
            writes.run()
        # Whether the teacher moves at all is asked last, since that synchronises with the device.
        if (added or exchanges or dtypes != self._dtypes) and share > 0:
            self._dtypes = dtypes
            for name, new in (*plan.modules.items(), *plan.parameters.items()):
                path, _, key = name.rpartition(".")
                setattr(plan.teacher.get_submodule(path), key, new)
            for exchange in exchanges:
                exchange.run()

    def _added(self, plan: Plan) -> bool:
        """Update the copies of new parameters to the student's weights after the step."""
        if not (plan.modules or plan.parameters):
            return False
        theirs = _parameters(plan.there)
        known = {id(pair.own) for pair in plan.pairs}
        parts = [*plan.parameters.items()]
        for path, module in plan.modules.items():
            parts += [(joined(path, name), each) for name, each in module.named_parameters()]
        for name, own in parts:
            if id(own) not in known:
                local(own).copy_(local(theirs[name]))
        return True

    def _prepare(self, pair: Pair, writes: _Writes) -> None:
        own, its = pair.own, pair.its
        alike = own.dtype == its.dtype and own.device == its.device
        if alike and own.dtype in _WHOLE and type(own) is type(its) is nn.Parameter:
            writes.average(own, its)  # as most are, and without views of each
            return
        own, its = local(own).detach(), local(its).detach()
        if own.is_complex():
            own, its = torch.view_as_real(own), torch.view_as_real(its.to(own.dtype))
        if not own.is_floating_point():
            writes.put(own, its)
        elif not is_short(own):
            writes.average(own, its.to(own.device, own.dtype))
        else:
            kept = self.remembers and (pair.its.requires_grad or pair.name in self.shadows)
            shadow = self.shadow(pair) if kept else own.float()
            # Where other code has written to the weight, continue from its values.
            there = own.float() if own.dtype.itemsize < 2 else own  # 8-bit floats have no ==
            shadow.copy_(
                torch.where(shadow.to(own.dtype).to(there.dtype) == there, shadow, there)
            )  # in place, since the optimizer's state shows it
            writes.average(shadow, its.to(own.device, torch.float32), rounded=own)

    def shadow(self, pair: Pair) -> Tensor:
        """The float32 average of a weight in half precision; this rank's part of it."""
        own = local(pair.own).detach()
        shadow = self.shadows.get(pair.name)
        if shadow is None or shadow.shape != own.shape:
            shadow = own.to(torch.float32, copy=True)
        self.shadows[pair.name] = shadow = shadow.to(own.device)
        return shadow

    def _prepare_buffers(
        self, plan: Plan, writes: _Writes, dtypes: dict[str, torch.dtype]
    ) -> list[_Exchange]:
        """Add writes of buffers and the student's dtypes; returns the buffers to replace."""
        exchanges: list[_Exchange] = []
        if self.buffers == "skip":
            dtypes.update(self._dtypes)
            return exchanges
        there = dict(plan.here)
        for root, module in plan.modules.items():
            there.update((joined(root, path), each) for path, each in module.named_modules())
        weights: list[tuple[int, int]] | None = None
        clones: dict[int, Tensor] = {}
        done: set[int] = set()
        averaged: set[int] = set()
        for path, module in plan.there.items():
            owner = there.get(path)
            if owner is None or id(owner) in done or not (owner._buffers or module._buffers):
                continue
            done.add(id(owner))
            mine, theirs = dict(owner._buffers.items()), dict(module._buffers.items())
            for key in mine.keys() | theirs.keys():
                name = joined(path, key)
                own, its = mine.get(key), theirs.get(key)
                if its is not None:
                    dtypes[name] = its.dtype
                if name in self._apart or (own is its and (key in mine) == (key in theirs)):
                    continue
                if its is None:
                    exchanges.append(_Exchange(owner, key, None, gone=key not in theirs))
                    continue
                dtype = its.dtype
                if own is not None and self._dtypes.get(name, dtype) == dtype:
                    # The teacher may have been made with another dtype on purpose.
                    dtype = own.dtype if torch.can_cast(its.dtype, own.dtype) else its.dtype
                if own is not None and _fits(own, its, dtype):
                    # A buffer that is a view of a weight follows with the weight.
                    if weights is None:
                        spans = (_span(local(pair.own)) for pair in plan.pairs)
                        weights = sorted(span for span in spans if span is not None)
                    if _overlap(local(own), weights) or id(own) in averaged:
                        continue
                    averages = self.buffers == "average" and own.is_floating_point()
                    with torch._C.DisableTorchFunctionSubclass():
                        if averages and not is_short(own):
                            averaged.add(id(own))
                            its = local(its).to(own.device, own.dtype)
                            writes.average(local(own), its)
                        else:
                            writes.put(local(own), local(its))
                    continue
                if id(its) not in clones:
                    device = plan.device_of(its) if own is None else own.device
                    clones[id(its)] = its.detach().to(device, dtype, copy=True)
                fleeting = key in module._non_persistent_buffers_set
                exchanges.append(_Exchange(owner, key, clones[id(its)], fleeting=fleeting))
        return exchanges


@dataclass(frozen=True, eq=False)
class _Exchange:
    """A buffer that is replaced by another tensor or None, or removed."""

    module: nn.Module
    key: str
    buffer: Tensor | None
    fleeting: bool = False
    gone: bool = False

    def run(self) -> None:
        if self.gone:
            del self.module._buffers[self.key]
            return
        self.module._buffers[self.key] = self.buffer
        if self.fleeting:
            self.module._non_persistent_buffers_set.add(self.key)


class _Writes:
    """Changes of a teacher, which are all prepared before the first is made."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._averages: list[tuple[Tensor, Tensor]] = []
        self._puts: list[tuple[Tensor, Tensor]] = []
        self._rounded: list[tuple[Tensor, Tensor]] = []

    def average(self, own: Tensor, its: Tensor, rounded: Tensor | None = None) -> None:
        """Average with `its`; `rounded` is set to the result in its own dtype."""
        self._averages.append((own, its))
        if rounded is not None:
            self._rounded.append((rounded, own))

    def put(self, own: Tensor, its: Tensor) -> None:
        """Copy `its`, unless the share is 0."""
        if isinstance(self._share, Tensor):
            its = its.to(own.device, own.dtype)
            its = _where(self._share.to(own.device) > 0, its, own)
        self._puts.append((own, its))

    def run(self) -> None:
        own = [mine for mine, _ in self._averages]
        its = [theirs for _, theirs in self._averages]
        share = self._share
        if own and isinstance(share, Tensor):
            kinds = {(each.device, each.dtype) for each in own}
            shares = {kind: share.to(*kind) for kind in kinds}
            torch._foreach_lerp_(own, its, [shares[each.device, each.dtype] for each in own])
        elif own:
            torch._foreach_lerp_(own, its, float(share))
        for pairs in (self._rounded, self._puts):
            if pairs:
                torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs])


def _where(condition: Tensor, its: Tensor, own: Tensor) -> Tensor:
    """`torch.where` for two tensors of one dtype, which may be float8 also in older torch."""
    if own.dtype.itemsize > 1:
        return torch.where(condition, its, own)
    return torch.where(condition, its.view(torch.uint8), own.view(torch.uint8)).view(own.dtype)


def is_short(tensor: Tensor) -> bool:
    """Whether a floating-point tensor has less than 32 bits per element."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def paired(teacher: nn.Module, student: nn.Module) -> Iterator[Pair]:
    """The pairs of parameters with the same names, without a check."""
    theirs = dict(unwrapped(student).named_parameters(remove_duplicate=False))
    for name, own in unwrapped(teacher).named_parameters():
        if name in theirs:
            yield Pair(name, own, theirs[name])


def _parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        joined(path, key): parameter
        for path, module in modules.items()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def _facts(pair: Pair) -> tuple[Any, ...] | None:
    """The properties that a check of a pair depends on; None if it must always be repeated."""
    own, its = pair.own, pair.its
    if type(own) is not nn.Parameter or type(its) is not nn.Parameter:
        return None
    if own.layout != torch.strided or its.layout != torch.strided:
        return None
    return (
        id(own), own.data_ptr(), own.shape, own.stride(), own.dtype,
        id(its), its.data_ptr(), its.shape, its.dtype, its.requires_grad,
    )  # fmt: skip


def _is_shared(pair: Pair) -> bool:
    """Whether teacher and student share a weight on purpose, which must be frozen.

    Raises:
        ValueError: If they share a weight that is trained.
    """
    span = _span(local(pair.own))
    if pair.own is not pair.its and (span is None or span != _span(local(pair.its))):
        return False
    if pair.its.requires_grad:
        raise ValueError(
            f"teacher and student share the memory of {pair.name!r}, so that it would be no "
            "average; make the teacher with copy.deepcopy(student)"
        )
    return True


def _check(pair: Pair) -> None:
    own, its = pair.own, pair.its
    facts = (
        ("shape", tuple(own.shape), tuple(its.shape)),
        ("placement", _placed(own), _placed(its)),
        ("shape of its shard", tuple(local(own).shape), tuple(local(its).shape)),
    )
    for what, here, there in facts:
        if here != there:
            raise ValueError(
                f"the {what} of {pair.name!r} is {here} in the teacher and {there} in the "
                "student; make a new teacher of the student as it is now"
            )
    if not torch.can_cast(its.dtype, own.dtype):
        raise ValueError(
            f"{pair.name!r} is {own.dtype} in the teacher, which cannot hold the student's "
            f"{its.dtype}; make a new teacher of the student as it is now"
        )
    if own.is_meta or its.is_meta:
        raise ValueError(
            f"{pair.name!r} is on the meta device in the {'teacher' if own.is_meta else 'student'}"
            "; give it memory with to_empty(), and its weights, first"
        )
    if not is_writable(local(own)):
        raise ValueError(
            f"the teacher's {pair.name!r} cannot be written to (it is expanded, sparse, quantised "
            "or made in inference mode); give it memory of its own with .clone()"
        )


def _placed(tensor: Tensor) -> str:
    if not is_sharded(tensor):
        return "whole"
    return f"{tensor.placements} on {tensor.device_mesh}"  # type: ignore[attr-defined]  # a DTensor


def _equal(pair: Pair) -> bool:
    if pair.its.requires_grad or pair.own.dtype != pair.its.dtype:
        return False
    own, its = local(pair.own), local(pair.its)
    return own.device == its.device and torch.equal(own, its)


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses where a tensor's memory starts and ends; None if it has no plain memory."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # some subclasses hold several tensors
        return None
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.itemsize) if start else None


def _overlap(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a tensor overlaps one of these spans of memory, which are sorted."""
    span = _span(tensor)
    if span is None:
        return False
    position = bisect.bisect_left(spans, (span[1],))
    return position > 0 and spans[position - 1][1] > span[0]


def _fits(own: Tensor, its: Tensor, dtype: torch.dtype) -> bool:
    """Whether another buffer's values can be copied to a buffer in place."""
    return (
        own.shape == its.shape
        and own.dtype == dtype
        and its.layout == torch.strided
        and is_sharded(own) == is_sharded(its)
        and is_writable(local(own))
        and not its.is_quantized
    )


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """All buffers by name, including None; a buffer may have several names."""
    for path, each in modules_by_path(module).items():
        for key, buffer in each._buffers.items():
            yield joined(path, key), buffer
