"""Running many independent trainings, with progress on standard error."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from examples.common.progress import INTERVAL, Progress

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    description: str,
    interval: float = INTERVAL,
    done: Callable[[Job, Result], None] = lambda job, result: None,
) -> list[Result]:
    """The results of all jobs, in their order.

    Every job has one thread, in this process or in another, so that the results do not depend on
    the number of workers.

    Args:
        function: Of a module, so that other processes find it.
        jobs: What it is called with, one at a time.
        workers: Number of processes; 1 is this one.
        description: What the progress is headed with.
        interval: Seconds between lines of progress where there is no terminal.
        done: Called with each job and its result as soon as it is there.
    """
    torch.set_num_threads(1)
    progress = Progress(len(jobs), description, "run", interval=interval)

    def counted(job: Job, result: Result) -> Result:
        done(job, result)
        progress.update()
        return result

    if workers == 1:
        with progress:
            return [counted(job, function(job)) for job in jobs]
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    with progress, pool:
        return list(map(counted, jobs, pool.map(function, jobs)))


def run_missing(
    function: Callable[[Any], dict[str, Any]],
    jobs: Sequence[Any],
    workers: int,
    description: str,
    path: Path,
) -> list[dict[str, Any]]:
    """The results of all jobs; those that a file has from an earlier call are not done again.

    Each result is written as soon as it is there, so that an interruption loses none.

    Args:
        function: As for `run_jobs`; it returns what JSON can hold.
        jobs: Dataclasses. A result is found again by all fields of its job.
        workers: Number of processes.
        description: What the progress is headed with.
        path: The file, one result a line. It need not exist.
    """
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the last line was cut short
        path.write_text(whole)
    kept = {_key(line["job"]): line["result"] for line in map(json.loads, whole.splitlines())}
    missing = [job for job in dict.fromkeys(jobs) if _key(asdict(job)) not in kept]
    if missing:
        with path.open("a") as file:

            def write(job: Any, result: dict[str, Any]) -> None:
                print(json.dumps({"job": asdict(job), "result": result}), file=file, flush=True)
                kept[_key(asdict(job))] = result

            run_jobs(function, missing, workers, description, done=write)
    return [dict(kept[_key(asdict(job))]) for job in jobs]


def _key(job: dict[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)
