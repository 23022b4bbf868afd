"""Running a function on several ranks of one machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gradkit import flat

# Processes are forked from one that has imported everything once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "gradkit"])


class FailedRankError(AssertionError):
    """A rank raised; the message holds every rank's traceback."""


def on_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60
) -> list[Any]:
    """What `function(*arguments)` returns on each of `count` ranks of a gloo group.

    Args:
        count: How many ranks.
        function: Defined at the top of a module; returns what `torch.save` can write.
        arguments: Its arguments.
        timeout: Seconds after which a collective that not every rank has entered fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _CONTEXT.Process(target=_rank, args=(r, count, folder, timeout, function, arguments))
            for r in range(count)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(180)
        hung = [r for r, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        if errors or hung:
            raise FailedRankError("\n".join([*errors, *(f"rank {r} hung" for r in hung)]))
        return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(count)]


def _rank(
    rank: int,
    count: int,
    folder: Path,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    flat.LARGE = 4  # as in the tests on one process
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(0)  # a group that has timed out may never come down
