"""Running a function on several ranks of one machine."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gradkit.core import flat

# Processes are forked from one that has imported everything once; dynamo is what the first
# optimizer of a process imports.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "gradkit",
    ]
)

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether `fully_shard` works on a CPU in this version of torch."""

GRACE = 30
"""Seconds beyond a rank's own time limit after which it is killed from outside."""


class FailedRankError(AssertionError):
    """A rank raised, hung or crashed; the message holds every such rank's traceback."""


def on_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 60,
    limit: float = 180,
    shards: bool = False,
) -> list[Any]:
    """What `function(*arguments)` returns on each of `count` ranks of a gloo group.

    Args:
        count: How many ranks.
        function: Defined at the top of a module; returns what `torch.save` can write.
        arguments: Its arguments.
        timeout: Seconds after which a collective that not every rank has entered fails.
        limit: Seconds after which a rank prints its threads' stacks and ends.
        shards: Whether parameters are sharded on the CPU; skips the test if torch cannot.

    Raises:
        FailedRankError: A rank did not come back with a result.
    """
    if shards and not SHARDS_ON_CPU:
        pytest.skip("fully_shard of this version of torch needs an accelerator")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _CONTEXT.Process(
                target=_rank, args=(r, count, folder, timeout, limit, function, arguments)
            )
            for r in range(count)
        ]
        try:
            for rank in ranks:
                rank.start()
            last = time.monotonic() + limit + GRACE
            for rank in ranks:
                rank.join(max(0.0, last - time.monotonic()))
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        failures = [
            _failure(r, rank.exitcode, folder)
            for r, rank in enumerate(ranks)
            if not (folder / f"{r}.pt").exists()
        ]
        if failures:
            raise FailedRankError("\n".join(failures))
        return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(count)]


def _failure(rank: int, code: int | None, folder: Path) -> str:
    error, stacks = (folder / f"{rank}.{what}" for what in ("error", "stacks"))
    if error.exists():
        return error.read_text(encoding="utf-8")
    printed = stacks.read_text(encoding="utf-8", errors="replace") if stacks.exists() else ""
    what = "hung" if code == -signal.SIGKILL or "Timeout" in printed else "crashed"
    return f"rank {rank} {what}, exit code {code}:\n{printed}"


def _rank(
    rank: int,
    count: int,
    folder: Path,
    timeout: float,
    limit: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(limit, exit=True, file=stacks)
    torch.set_num_threads(1)
    flat.LARGE = 4  # as in the tests on one process
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            # No URL, in which a folder's name might mean something else.
            store=dist.FileStore(str(folder / "store"), count),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=timeout),
        )
        result = folder / f"{rank}.part"
        torch.save(function(*arguments), result)
        result.rename(folder / f"{rank}.pt")
    except BaseException:
        text = f"rank {rank}:\n{traceback.format_exc()}"
        (folder / f"{rank}.error").write_text(text, encoding="utf-8")
    finally:
        os._exit(0)  # a group that has timed out may never come down
