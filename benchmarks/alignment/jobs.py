"""Running many independent trainings, with progress on standard error."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

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
    """
    torch.set_num_threads(1)
    progress = Progress(len(jobs), description, "run", interval=interval)
    if workers == 1:
        with progress:
            return [_counted(function(job), progress) for job in jobs]
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    with progress, pool:
        return [_counted(result, progress) for result in pool.map(function, jobs)]


def _counted(result: Result, progress: Progress) -> Result:
    progress.update()
    return result
