"""The ranks that take a step together, and sharded tensors.

Two kinds of parallel training are supported. Under `DistributedDataParallel` each rank holds all
weights, and the ranks' gradients are averaged: one all-reduce of the flat rows. Under `fully_shard`
(FSDP2) each rank holds a shard of every tensor and gradients arrive averaged. Only the inner
products are partial sums: one all-reduce of the Gram matrix.

Ranks agree before anything is changed. If a closure fails on one rank, that rank reports it in the
same exchange that the other ranks enter after their closures, so that all ranks raise.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ProcessGroupChoice = Any  # "auto", None or a torch.distributed.ProcessGroup

_MESSAGE_BYTES = 512

Stage = Literal["evaluation", "step", "applied", "losses", "idle"]
_STAGES: dict[Stage, int] = {"evaluation": 1, "step": 2, "applied": 3, "losses": 4, "idle": 5}


class RankError(RuntimeError):
    """Another rank failed, or the ranks differ where they must not.

    Nothing was changed on this rank, unless the message says that its base optimizer has stepped.
    """


# Sharded tensors.


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    # Not imported, which takes half a second; without the import there can be no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of it, unless it is a `DTensor`.

    Examples:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor
    return part


def as_part_of(part: Tensor, whole: Tensor) -> Tensor:
    """A tensor distributed like `whole`, from this rank's part of it; the inverse of `local`.

    Examples:
        >>> as_part_of(torch.zeros(2), torch.ones(2))
        tensor([0., 0.])
    """
    if not is_sharded(whole):
        return part
    made: Tensor = type(whole).from_local(  # type: ignore[attr-defined]  # a DTensor
        part,
        whole.device_mesh,  # type: ignore[attr-defined]  # a DTensor
        whole.placements,  # type: ignore[attr-defined]  # a DTensor
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def part_of(tensor: Tensor, whole: Tensor) -> Tensor:
    """The part of a tensor that this rank would hold if it were distributed like `whole`.

    The tensor must be the same on all ranks.

    Examples:
        >>> part_of(torch.zeros(2), torch.ones(2))
        tensor([0., 0.])
    """
    if not is_sharded(whole):
        return tensor
    mesh = whole.device_mesh  # type: ignore[attr-defined]  # a DTensor
    everywhere = [torch.distributed.tensor.Replicate()] * mesh.ndim
    same: Any = type(whole).from_local(  # type: ignore[attr-defined]  # a DTensor
        tensor, mesh, everywhere, run_check=False
    )
    placements = whole.placements  # type: ignore[attr-defined]  # a DTensor
    part: Tensor = same.redistribute(placements=placements).to_local()
    return part


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free gathered weights, which a forward pass without a backward pass leaves in modules."""
    if "torch.distributed.fsdp" in sys.modules:
        for each in modules:
            if isinstance(each, torch.distributed.fsdp.FSDPModule):
                each.reshard()


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory, so that the tensor cannot be written to in place."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


@dataclass(frozen=True)
class Shards:
    """How the parameters are sharded over ranks.

    Attributes:
        group: The ranks that together hold one vector.
        everyone: Groups such that reducing over one after the other reaches every rank.
    """

    group: dist.ProcessGroup
    everyone: tuple[dist.ProcessGroup, ...]

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> Shards | None:
        """How these parameters are sharded; None if they are plain tensors.

        Raises:
            ValueError: If they are not all sharded in the same way, along one mesh dimension.
        """
        sharded = [is_sharded(parameter) for parameter in parameters]
        if not any(sharded):
            return None
        if not all(sharded):
            index = sharded.index(False)
            raise ValueError(
                f"parameter {index} (of those that require a gradient) is a plain tensor while "
                "others are sharded; call fully_shard() on the root module too, so that all are"
            )
        first: Any = parameters[0]
        mesh = first.device_mesh
        dimension = _shard_dimension(first)
        for parameter in parameters:
            other: Any = parameter
            if other.device_mesh != mesh or _shard_dimension(other) != dimension:
                raise ValueError(
                    f"parameters are sharded differently ({other.placements} on "
                    f"{other.device_mesh} beside {first.placements} on {mesh}); gradkit works on "
                    "the shards that fully_shard() makes on one mesh"
                )
        return cls(
            group=mesh.get_group(dimension),
            everyone=tuple(mesh.get_group(d) for d in range(mesh.ndim)),
        )

    def add_up(self, products: Tensor) -> Tensor:
        """The sum over all shards, computed in place."""
        dist.all_reduce(products, group=self.group)
        return products


def _shard_dimension(parameter: Any) -> int:
    dimensions = [
        d for d, placement in enumerate(parameter.placements) if type(placement).__name__ == "Shard"
    ]
    whole = [placement.is_replicate() for placement in parameter.placements]
    if len(dimensions) != 1 or sum(whole) != len(whole) - 1:
        raise ValueError(
            f"a parameter has the placements {parameter.placements}; gradkit works on shards "
            "along one dimension of the mesh, as fully_shard() makes them (tensor parallelism "
            "is not supported)"
        )
    return dimensions[0]


# The ranks that step together.


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that take a step together; by default this rank alone.

    Attributes:
        groups: Groups such that reducing over one after the other reaches every rank.
        averages: Whether each rank has gradients of its own, which must be averaged.
        replicas: DDP modules, whose own reduction is switched off while closures run.
        communicates: Whether closures contain collectives. Ranks can then not exchange anything
            after a closure that failed.
        unclear: The number of ranks, if it is not known which ones belong together; else 0.
        has_model: Whether a model was given.
    """

    groups: tuple[dist.ProcessGroup, ...] = ()
    averages: bool = False
    replicas: tuple[DistributedDataParallel, ...] = ()
    communicates: bool = False
    unclear: int = 0
    has_model: bool = False

    @classmethod
    def of(
        cls, model: nn.Module | None, shards: Shards | None, choice: ProcessGroupChoice
    ) -> Ranks:
        """The ranks that a model and its parameters belong to.

        Args:
            model: The module whose parameters are optimised.
            shards: How the parameters are sharded; None if they are not.
            choice: "auto", None for this rank alone, or a process group.

        Raises:
            ValueError: If the choice does not fit the model.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        modules = [] if model is None else list(model.modules())
        replicas = tuple(m for m in modules if isinstance(m, DistributedDataParallel))
        synchronised = any(isinstance(m, nn.SyncBatchNorm) for m in modules)
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in modules):
            raise ValueError(
                "model is wrapped in FullyShardedDataParallel, whose flat parameters hide their "
                "shards; use torch.distributed.fsdp.fully_shard() instead"
            )
        if any(replica.static_graph for replica in replicas):
            raise ValueError(
                "model is a DistributedDataParallel module with static_graph=True, which must see "
                "every backward pass; leave that option out (gradients are reduced once per "
                "evaluation here, whatever the graph)"
            )
        if any(getattr(replica._join_config, "enable", False) for replica in replicas):
            raise ValueError(
                "step() was called inside the join() of a DistributedDataParallel module, which "
                "replays only that module's own collectives on ranks without data, so that others "
                "would hang or crash; give every rank the same number of steps"
            )
        if shards is not None:
            if model is None:
                raise ValueError(
                    "the parameters are sharded, and without model= gathered copies of displaced "
                    "weights could not be freed; pass the sharded module as model="
                )
            if choice != "auto":
                raise ValueError(
                    "process_group= is given, but the parameters are sharded and their mesh says "
                    "which ranks belong together; leave process_group= out"
                )
            return cls(shards.everyone, communicates=True)
        if choice is None and replicas:
            raise ValueError(
                "process_group=None means that each rank steps by itself, but model= is a "
                "DistributedDataParallel module; pass its .module, or leave process_group= out"
            )
        if choice is None:
            return cls()
        if isinstance(choice, str):
            if replicas:
                groups = tuple(dict.fromkeys(m.process_group for m in replicas))
                if len(groups) > 1:
                    raise ValueError(
                        "model holds DistributedDataParallel modules of different process groups; "
                        "give each group's module an optimizer of its own"
                    )
                return cls(groups, True, replicas, communicates=synchronised)
            return cls(unclear=dist.get_world_size(), has_model=model is not None)
        if not isinstance(choice, dist.ProcessGroup) or dist.get_rank(choice) < 0:
            raise ValueError(
                "this rank is not a member of process_group=; pass each rank the group it is in"
            )
        return cls((choice,), True, replicas, communicates=synchronised)

    @property
    def together(self) -> bool:
        """Whether this rank takes steps together with others."""
        return bool(self.groups)

    def check_clear(self, count: int) -> None:
        """Check that it is known which ranks belong together, where that matters.

        Args:
            count: The number of objectives.

        Raises:
            RuntimeError: If several ranks would silently step on different gradients.
        """
        if self.unclear > 1 and (count > 1 or self.has_model):
            what = (
                "model= is no DistributedDataParallel module and has no sharded parameters"
                if self.has_model
                else f"there are {count} objectives and no model="
            )
            raise RuntimeError(
                f"the process group has {self.unclear} ranks, but {what}, so that gradients would "
                "stay each rank's own and the ranks drift apart; pass model= the DDP or FSDP "
                "module, or process_group= the ranks to average over (None if each rank trains "
                "by itself)"
            )

    def local_gradients(self) -> AbstractContextManager[None]:
        """A context in which gradients and buffers are not synchronised between ranks."""
        return self._local_gradients() if self.replicas else nullcontext()

    @contextmanager
    def _local_gradients(self) -> Iterator[None]:
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica.no_sync())
                # Otherwise the first forward would broadcast the buffers, and wait for a rank that
                # has failed before its own. They are broadcast after the step.
                replica.require_forward_param_sync = False
            yield

    def agree(
        self,
        stage: Stage,
        device: torch.device,
        *,
        names: Sequence[str] = (),
        settings: int = 0,
        flags: bytes = b"",
    ) -> bool:
        """Check that all ranks have come to the same stage with the same objectives and settings.

        Args:
            stage: The stage of the step.
            device: The device for the exchange.
            names: The objectives.
            settings: A number that must be the same on all ranks.
            flags: Flags that may differ between ranks.

        Returns:
            Whether `flags` are the same on all ranks.

        Raises:
            RankError: If a rank has failed, or if stage, objectives or settings differ.
        """
        if not self.groups:
            return True
        facts = [_STAGES[stage], zlib.crc32(repr(tuple(names)).encode()), settings]
        header = self._exchange(device, [0, *facts, zlib.crc32(flags)])
        failed, least, most = header[0], header[1::2], header[2::2]
        if failed:
            message = self._message(device, b"").rstrip(b"\0").decode(errors="replace")
            raise RankError(
                f"rank {failed - 1} failed with {message}; "
                + (
                    "this rank's base optimizer has stepped already, so that their weights differ: "
                    "go on from a checkpoint"
                    if stage == "applied"
                    else "this rank has changed nothing either"
                )
            )
        what = (
            "stages of the step (transforms or closures that differ by rank)",
            "objectives or their order",
            "learning rates or other settings, in what they optimise or have applied so far, or "
            "in their transforms' state and random generators",
        )
        for position, subject in enumerate(what):
            if -least[position] != most[position]:
                raise RankError(
                    f"the ranks differ in their {subject}, so that their weights would drift "
                    "apart; give every rank the same ones"
                )
        return -least[3] == most[3]

    def report(self, error: BaseException, device: torch.device) -> None:
        """Report to the other ranks, which wait for this one, that it has failed."""
        if not self.groups or self.communicates or isinstance(error, RankError):
            return
        text = f"{type(error).__name__}: {error}".encode()[:_MESSAGE_BYTES]
        try:
            failed = self._exchange(device, [dist.get_rank() + 1, 0, 0, 0, 0])[0]
            # Of several failures, that of the highest rank is reported.
            self._message(device, text if failed == dist.get_rank() + 1 else b"")
        except RuntimeError:
            return  # the other ranks have ended; this rank's own error says more

    def _exchange(self, device: torch.device, facts: Sequence[int]) -> list[int]:
        numbers = [facts[0]]
        for fact in facts[1:]:
            numbers += [-fact, fact]
        header = torch.tensor(numbers, dtype=torch.int64, device=device)
        for group in self.groups:
            dist.all_reduce(header, op=dist.ReduceOp.MAX, group=group)
        return [int(number) for number in header.tolist()]

    def _message(self, device: torch.device, text: bytes) -> bytes:
        padded = torch.frombuffer(bytearray(text.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8)
        padded = padded.to(device)
        for group in self.groups:
            dist.all_reduce(padded, op=dist.ReduceOp.MAX, group=group)
        return bytes(padded.cpu().tolist())

    def add_up(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, computed in place."""
        for group in self.groups:
            dist.all_reduce(numbers, group=group)
        return numbers

    def any(self, flags: Sequence[Sequence[bool]], device: torch.device) -> list[list[bool]]:
        """Elementwise, whether a flag is set on any rank."""
        everywhere = torch.tensor(flags, dtype=torch.uint8, device=device)
        for group in self.groups:
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=group)
        return [[bool(flag) for flag in row] for row in everywhere.tolist()]

    @property
    def size(self) -> int:
        """The number of ranks that step together."""
        size = 1
        for group in self.groups:
            size *= dist.get_world_size(group)
        return size

    def share_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Copy the first rank's buffers to every rank, as DDP does before each forward."""
        if not self.averages:
            return
        if self.replicas and not any(replica.broadcast_buffers for replica in self.replicas):
            return
        self._broadcast([each for each in dict.fromkeys(buffers) if not is_expanded(each)])

    @torch.no_grad()
    def _broadcast(self, buffers: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for alike in by_dtype.values():
            joined = torch.cat([buffer.reshape(-1) for buffer in alike])
            raw = joined.view(torch.uint8)  # not every backend knows every dtype
            for group in self.groups:
                dist.broadcast(raw, src=dist.get_global_rank(group, 0), group=group)
            parts = torch.split(joined, [buffer.numel() for buffer in alike])
            for buffer, part in zip(alike, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


ALONE = Ranks()
"""This rank alone."""
