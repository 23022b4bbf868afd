"""Peak memory above plain training, each variant in a fresh process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.gsema import METHOD
from benchmarks.speed.peak import CONTROL, comparison_of
from benchmarks.speed.problem import CLASSIFIER, RESUNET, Problem, wide_mlp
from benchmarks.speed.stream import MEMORY as MEMORY_OF_MANY
from benchmarks.speed.stream import PLAIN, many_objectives

MEMORY = "peak memory above plain training, P numbers"
RESOLUTION = 0.05
"""What is not told apart, P numbers: the allocator's and the libraries' small change."""
ENVIRONMENT = {
    # Large blocks come from the system and go back to it at once, so that what is resident is
    # what is in use; by default glibc would keep freed blocks of up to 32 MB.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}
LIMIT = 1800.0
"""Seconds after which a measurement has hung: it prints its stacks and ends."""
_ROOT = Path(__file__).parents[2]


def measure_memory(
    objectives: Sequence[int],
    with_sam: bool,
    width: int,
    device: torch.device,
    threads: int,
    *,
    with_gs_ema: bool = False,
) -> list[dict[str, object]]:
    """One row for each method and variant, and one for the control."""
    problem = wide_mlp(2, torch.device("cpu"))
    requests: list[dict[str, Any]] = [
        {"method": "control", "objectives": None, "variant": CONTROL, "expected": 3.0}
    ]
    chosen: list[dict[str, Any]] = [{"objectives": count} for count in objectives]
    chosen += [{"objectives": None}] if with_sam else []
    chosen += [{"objectives": None, "method": METHOD}] if with_gs_ema else []
    for request in chosen:
        comparison = comparison_of(request, problem)
        requests += [
            {**request, "method": comparison.method, "variant": variant}
            for variant in (*comparison.ours, *comparison.peers)
        ]
    common = {"width": width, "device": str(device)}
    results = _measure_all([{**request, **common} for request in requests], device, threads)
    return [
        {
            "measure": MEMORY,
            "network": f"4 layers of {width}²",
            "case": "2 rows",
            "method": request["method"],
            "variant": request["variant"],
            **result,
        }
        for request, result in zip(requests, results, strict=True)
    ]


def measure_memory_of_many(
    problem: Problem, count: int, width: int, device: torch.device, threads: int
) -> list[dict[str, object]]:
    """One row for each variant of a step with many objectives."""
    network = CLASSIFIER if problem.network.startswith(CLASSIFIER) else RESUNET
    comparison = many_objectives(problem, count)
    requests = [
        {
            "network": network,
            "case": problem.case,
            "objectives": count,
            "variant": variant,
            "width": width,
            "device": str(device),
        }
        for variant in (*comparison.ours, *comparison.peers)
        if variant != PLAIN
    ]
    results = _measure_all(requests, device, threads)
    return [
        {
            "measure": MEMORY_OF_MANY,
            "network": problem.network,
            "case": problem.case,
            "method": comparison.method,
            "variant": request["variant"],
            **result,
        }
        for request, result in zip(requests, results, strict=True)
    ]


def _measure_all(
    requests: Sequence[dict[str, Any]], device: torch.device, threads: int
) -> list[dict[str, float]]:
    # Each process has one thread, so that as many can run side by side.
    with ThreadPoolExecutor(max_workers=threads if device.type == "cpu" else 1) as pool:
        values = [result["value"] for result in pool.map(measure_one, requests)]
    return [
        {"value": value, "low": value - RESOLUTION, "high": value + RESOLUTION} for value in values
    ]


def measure_one(request: dict[str, Any]) -> dict[str, float]:
    """Run a request in a process of its own.

    Raises:
        RuntimeError: That process failed, or took longer than `LIMIT` seconds.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.peak", json.dumps({**request, "limit": LIMIT})],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, **ENVIRONMENT},
        check=False,
        timeout=LIMIT + 120,  # for a process that hangs before it can watch itself
    )
    if done.returncode:
        raise RuntimeError(f"measuring {request['variant']} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured
