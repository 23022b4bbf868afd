"""`python -m benchmarks.gpu`: what a step costs on a CUDA device, in a few minutes.

The speed benchmark's comparisons, without other libraries and without what needs anything beside
torch, jaxtyping and numpy. Whatever goes wrong in one measurement is written down and keeps none
of the others from being made; what there is so far is on the disk after each.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import gradkit as gk
from benchmarks.gpu_report import as_markdown
from benchmarks.machine import describe_machine
from benchmarks.speed import cuda
from benchmarks.speed.comparison import Comparison, MakeStep, Step
from benchmarks.speed.grata import grata
from benchmarks.speed.methods import ENGINES, gradkit_name, pcgrad, sam, surgery, weighting
from benchmarks.speed.overhead import measure_overhead
from benchmarks.speed.problem import Problem, resunet, transformer, wide_mlp
from benchmarks.speed.timing import Clock, Rounds, bandwidth, summarise, time_in_turn
from benchmarks.speed.tta import measure_tta

SEED = 0


@dataclasses.dataclass
class Report:
    """What has been measured so far, written to the disk after each measurement.

    Attributes:
        folder: Where to.
        device: What is measured.
        deadline: When to begin nothing further, by the monotonic clock.
        record: The results.
    """

    folder: Path
    device: torch.device
    deadline: float
    record: dict[str, Any]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure something; an error in it is noted, with its traceback."""
        start = time.monotonic()
        print(f"{name} …", flush=True)
        try:
            yield
        except Exception:
            self.note(name, traceback.format_exc())
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
        self.write()

    def due(self, name: str) -> bool:
        """Whether there is time for something; if not, that is noted."""
        if time.monotonic() < self.deadline:
            return True
        self.record["left out for want of time"].append(name)
        return False

    def note(self, name: str, error: str) -> None:
        """Note that something went wrong."""
        print(f"{name} FAILED:\n{error}", flush=True)
        self.record["errors"].append({"part": name, "error": error})

    def write(self) -> None:
        """Write what there is."""
        (self.folder / "gpu-speed.json").write_text(json.dumps(self.record, indent=1) + "\n")
        (self.folder / "gpu-speed.md").write_text(as_markdown(self.record))


def main() -> int:
    """Measures, and returns 1 if anything went wrong."""
    options = parsed()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(
        options.out,
        device,
        time.monotonic() + options.seconds,
        {
            "command": " ".join(["python -m benchmarks.gpu", *map(shlex.quote, sys.argv[1:])]),
            "machine": {**describe_machine(), **driver(device)},
            "networks": {},
            "rows": [],
            "floors": [],
            "overhead": [],
            "memory": [],
            "waits": [],
            "adaptation": [],
            "launches": [],
            "errors": [],
            "left out for want of time": [],
        },
    )
    report.write()
    with report.part("bandwidth"):
        rate = bandwidth(device, 1 << (20 if options.tiny else 28))
        report.record["machine"]["bandwidth"] = f"{rate:.1f} GB/s"
    with report.part("overhead"):
        report.record["overhead"] = measure_overhead(20 if options.tiny else 200, device, SEED)
    if device.type == "cuda":
        with report.part("waits of the host"):
            small = resunet("2x64", 16, device)
            report.record["waits"] = cuda.host_waits(small)
    with report.part("memory"):
        measure_memory(report, 32 if options.tiny else 2048)
    for problem in adapted_problems(options.tiny, device):
        what = f"adaptation at once, {problem.case}"
        if report.due(what):
            with report.part(what):
                rounds = Rounds(2 if options.tiny else 3, 0, 0.0)
                report.record["adaptation"] += measure_tta(problem, Clock(device), rounds, SEED)
    for problem in problems(options.tiny, device):
        for name, make in comparisons(problem).items():
            what = f"{problem.network}, {problem.case}, {name}"
            if report.due(what):
                with report.part(what):
                    measure(report, make(), problem, 0.0 if options.tiny else options.each)
    text = as_markdown(report.record)
    print(text)
    print(f"The files are in {options.out}.")
    return 1 if report.record["errors"] else 0


def parsed() -> argparse.Namespace:
    """The command line; by argparse, which every machine has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="after which no measurement is begun"
    )
    parser.add_argument("--each", type=float, default=2.0, help="seconds of rounds of a comparison")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the command")
    return parser.parse_args()


def driver(device: torch.device) -> dict[str, str]:
    """What else to know of a machine with a CUDA device."""
    found = {"system": platform.platform(), "numpy": str(sys.modules["numpy"].__version__)}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "multiprocessors": str(properties.multi_processor_count),
        "device memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "TF32": f"convolutions {torch.backends.cudnn.allow_tf32}, "
        f"products {torch.get_float32_matmul_precision() != 'highest'}",
    }
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        found["driver"] = answer.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        found["driver"] = f"unknown ({error})"
    return found


def problems(tiny: bool, device: torch.device) -> list[Problem]:
    """Networks at a size where starting kernels is what costs, and at one where it is not."""
    if tiny:
        return [resunet("2x32", 4, device), transformer("2x4", 16, 1, device)]
    return [
        resunet("4x128", 64, device),
        resunet("16x256", 64, device),
        transformer("8x256", 512, 12, device),
    ]


def adapted_problems(tiny: bool, device: torch.device) -> list[Problem]:
    """Batches of images that are adapted to at once, each by itself."""
    return [resunet(case, 4 if tiny else 32, device) for case in (["2x64"] if tiny else ["16x128"])]


def comparisons(problem: Problem) -> dict[str, Callable[[], Comparison]]:
    """What to measure on a problem, the most wanted first."""
    made: dict[str, Callable[[], Comparison]] = {
        "PCGrad, K = 4": lambda: pcgrad(problem, 4),
        "SAM": lambda: sam(problem),
    }
    if problem.x.dim() == 4:
        made["GraTa's step"] = lambda: grata(problem)
    made["PCGrad, K = 2"] = lambda: pcgrad(problem, 2)
    made["PCGrad, K = 8"] = lambda: pcgrad(problem, 8)
    made["RLW, K = 4"] = lambda: weighting(problem, 4, "RLW")
    return made


def measure(report: Report, comparison: Comparison, problem: Problem, seconds: float) -> None:
    """A comparison's variants in turn, and the kernels that each starts beyond the floor's."""
    clock = Clock(report.device)
    what = f"{problem.network}, {problem.case}, {comparison.method}"

    def works(name: str, make: MakeStep) -> bool:
        try:
            make()()
            if report.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:
            report.note(f"{what}, {name}", traceback.format_exc())
            return False
        return True

    def tried(makers: Mapping[str, MakeStep]) -> dict[str, MakeStep]:
        """Those that work: one that does not is noted, and the others are measured."""
        return {name: make for name, make in makers.items() if works(name, make)}

    comparison = dataclasses.replace(
        comparison, ours=tried(comparison.ours), peers=tried(comparison.peers)
    )
    least = 2 if seconds == 0 else 7
    summary = summarise(time_in_turn(comparison, clock, Rounds(least, least, seconds)), SEED)
    where = {"network": problem.network, "case": problem.case, "method": comparison.method}
    report.record["networks"][problem.network] = problem.parameters()
    report.record["rows"] += [
        {**where, "variant": variant, **numbers} for variant, numbers in summary.items()
    ]
    rate = float(report.record["machine"].get("bandwidth", "nan").partition(" ")[0])
    report.record["floors"].append(
        {
            **where,
            "passes": comparison.passes,
            "parts": comparison.traffic.parts,
            "milliseconds": comparison.traffic.milliseconds(rate),
        }
    )
    if report.device.type == "cuda" and problem.case == "4x128":  # the number is the same at others
        found = cuda.launches_beyond(comparison)
        report.record["launches"] += [{**where, **row} for row in found]


def measure_memory(report: Report, width: int) -> None:
    """The peak of the allocator above that of plain training, on a network of wide layers."""
    if report.device.type != "cuda":
        return
    problem = wide_mlp(width, report.device)
    numbers = problem.parameters()

    def plain() -> Step:
        model, base = problem.pair()

        def step() -> None:
            problem.loss(model).backward()
            base.step()
            base.zero_grad()

        return step

    def peak(step: Step) -> float:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / (4 * numbers)

    before = peak(plain())
    methods: dict[str, tuple[int, Callable[[], gk.Transform]]] = {
        **{f"PCGrad, K = {count}": (count, gk.PCGrad) for count in (2, 4, 8)},
        "SAM": (1, gk.SAM),
    }
    for method, (count, make) in methods.items():
        for engine in ENGINES:
            gc.collect()
            added = peak(surgery(problem, count, make, engine)) - before
            report.record["memory"].append(
                {"method": method, "variant": gradkit_name(engine), "value": added}
            )


if __name__ == "__main__":
    sys.exit(main())
