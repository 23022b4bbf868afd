"""`python -m benchmarks.speed.peak JSON`: the peak memory of one variant, in this process.

The variant runs on a tiny network first, so that its code is loaded; then plain training, then the
variant. A process's peak never falls, and no variant needs less than plain training, whose memory
is given back before.
"""

import faulthandler
import gc
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.comparison import Comparison, Step
from benchmarks.speed.gsema import METHOD, gs_ema
from benchmarks.speed.methods import pcgrad, sam
from benchmarks.speed.problem import (
    CLASSIFIER,
    RESUNET,
    Problem,
    classifier,
    resunet,
    wide_mlp,
)
from benchmarks.speed.sharpness import METHODS as SHARP
from benchmarks.speed.sharpness import compare
from benchmarks.speed.stream import many_objectives

STEPS = 6
"""More than the five after which slow weights follow."""
CONTROL = "control: plain training that also makes 3 P numbers"


def comparison_of(request: Mapping[str, Any], problem: Problem) -> Comparison:
    """The comparison that a request names, of a method, of K objectives, or of SAM."""
    if request.get("method") == METHOD:
        return gs_ema(problem)
    if request.get("sharpness"):
        return compare(problem, [request["sharpness"]])
    count = request["objectives"]
    if request.get("network"):
        return many_objectives(problem, count)
    return sam(problem) if count is None else pcgrad(problem, count)


def problem_of(request: Mapping[str, Any], device: torch.device, *, tiny: bool = False) -> Problem:
    """What a request is measured on, or a tiny one of its kind."""
    width = 8 if tiny else request["width"]
    if request.get("network") == CLASSIFIER:
        return classifier(request["objectives"], width, device)
    if request.get("network") == RESUNET:
        return resunet("2x32" if tiny else request["case"], 4 if tiny else width, device)
    return wide_mlp(width, device)


def plain(problem: Problem, extra: int = 0, momentum: float = 0.0) -> Step:
    """Plain training; with `extra` times P further numbers while the gradients are there."""
    model, base = problem.pair(momentum)
    numbers = extra * sum(parameter.numel() for parameter in model.parameters())

    def step() -> None:
        problem.loss(model).backward()
        further = torch.ones(numbers, device=problem.x.device)
        base.step()
        del further
        base.zero_grad()

    return step


def peak(device: torch.device) -> int:
    """The highest memory so far, bytes: of the process, or of the CUDA allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, it does not begin with the parent's
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) for words in lines if words[0] == "VmHWM:") * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def variant_of(request: Mapping[str, Any], problem: Problem) -> Step:
    """The step that a request names."""
    if request["variant"] == CONTROL:
        return plain(problem, extra=3)
    comparison = comparison_of(request, problem)
    step: Step = {**comparison.ours, **comparison.peers}[request["variant"]]()
    return step


def run(step: Step) -> None:
    """Take a few steps."""
    for _ in range(STEPS):
        step()


def main(text: str) -> None:
    """Print what a request's variant needs above plain training, in units of P numbers."""
    request = json.loads(text)
    faulthandler.dump_traceback_later(request["limit"], exit=True)
    torch.set_num_threads(1)
    device = torch.device(request["device"])
    problem = problem_of(request, device)
    run(variant_of(request, problem_of(request, device, tiny=True)))
    method = SHARP.get(request.get("sharpness"))
    run(plain(problem, momentum=0.0 if method is None else method.momentum))
    gc.collect()
    before = peak(device)
    run(variant_of(request, problem))
    added = peak(device) - before
    print(json.dumps({"value": added / (4 * problem.parameters())}))


if __name__ == "__main__":
    main(sys.argv[1])
