"""Several processes that train together, as `torchrun` starts them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[None]:
    """Joins the processes for the time of a block, where `torchrun` has started this one."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """The number of processes; 1 where this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: torch.device) -> torch.device:
    """The device of this process: with CUDA and several processes, one for each."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def gathered(mine: Sequence[T], count: int) -> list[T]:
    """Joins what ranks have made of the items `rank()`, `rank() + ranks()`, … of `count`.

    Args:
        mine: Of this process, in the order of items.
        count: Of all items.
    """
    if ranks() == 1:
        return list(mine)
    parts: list[list[T]] = [[] for _ in range(ranks())]
    dist.all_gather_object(parts, list(mine))
    return [parts[item % ranks()][item // ranks()] for item in range(count)]
