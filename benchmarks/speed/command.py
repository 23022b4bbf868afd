"""The command `python -m benchmarks speed`."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.made_by import command_line, write_results
from benchmarks.speed import cuda
from benchmarks.speed.comparison import Comparison
from benchmarks.speed.goals import GOALS, judge, rule_goals, weight_goals
from benchmarks.speed.grata import grata
from benchmarks.speed.gsema import gs_ema, sign_cosine
from benchmarks.speed.memory import (
    ENVIRONMENT,
    measure_memory,
    measure_memory_of_many,
    measure_memory_of_sharpness,
)
from benchmarks.speed.methods import gated_ema, pcgrad, sam, weighting
from benchmarks.speed.overhead import measure_overhead
from benchmarks.speed.peers import PYTORCH_OPTIMIZER, TORCHJD
from benchmarks.speed.plot import plot
from benchmarks.speed.problem import RESUNET, Problem, classifier, parse_case, resunet, transformer
from benchmarks.speed.report import report
from benchmarks.speed.rules import exported_rules, kind_of, measure_rules
from benchmarks.speed.sharpness import measure_sharpness
from benchmarks.speed.slope import plot_slopes
from benchmarks.speed.stream import WEIGHTINGS, exported, measure_many
from benchmarks.speed.timing import RATIO, Clock, Rounds, bandwidth, summarise, time_in_turn
from benchmarks.speed.tta import measure_tta
from benchmarks.speed.weights import measure_weights
from examples.common.usage import (
    UsageError,
    check_writable,
    open_device,
    refuse_to_replace,
    require,
    split_names,
)
from gradkit.surgery import PCGrad, Rule

METHODS = ("pcgrad", "sam", "grata", "gs_ema", "gated_ema")
PARTS = (*METHODS, "sharpness", "rules", "weights", "stream", "tta", "overhead", "memory")
NETWORKS = ("resunet", "transformer")


@dataclass(frozen=True)
class Speed:
    """Time gradkit's methods beside their floors and beside other libraries.

    Writes OUT/speed.json, OUT/speed.md, OUT/speed.png and OUT/speed-objectives.png.
    """

    parts: str = ",".join(PARTS)
    """What to measure, separated by commas: methods; every sharpness-aware step; every rule's step;
    weights by themselves; many objectives and loss weighting; adaptation of views and of images at
    once; the engine's overhead; memory."""
    networks: str = ",".join(NETWORKS)
    """On which networks; GraTa's step is measured on images only."""
    objectives: str = "2,4,8,16"
    """K, the numbers of objectives for PCGrad."""
    resunet_cases: str = "2x64,4x128"
    """Batch size and image side, BATCHxSIDE; GatedEMA's update and the cosine of signs are measured
    at the first only."""
    goal_cases: str = "8x192"
    """Further cases of ResUNet-34, for methods with a goal there only."""
    transformer_cases: str = "2x64"
    """Batch size and sequence length, BATCHxLENGTH."""
    width: int = 64
    """Channels of ResUNet-34's first stage; 64 is the published one."""
    transformer_width: int = 512
    """Width of the transformer, a multiple of its 8 heads."""
    transformer_layers: int = 12
    """Layers of the transformer."""
    rounds: int = 5
    """Rounds in which the floor and gradkit's variants take one step each."""
    peer_rounds: int = 3
    """The first of these, in which the peers, which are slow, take part; 0 leaves them out, with
    what they do to the allocator."""
    seconds: float = 8.0
    """For how long gradkit and the floor go on with further rounds, each method at each case."""
    rule_objectives: str = "4"
    """K, the numbers of objectives for every rule's step."""
    rule_cases: str = "2x64"
    """Cases of ResUNet-34 at which every rule's step is measured."""
    elementwise_cases: str = "4x128"
    """Further ones, for PCGrad and the elementwise rules."""
    rule_rounds: int = 7
    """Rounds for each rule."""
    weight_seconds: float = 0.2
    """For how long a rule's weights are computed, for each K and kind of Gram matrix; half of it by
    the peer."""
    stream_objectives: str = "32,64"
    """K, the numbers of samples whose losses are a classifier's objectives."""
    stream_width: int = 1024
    """Width of this classifier."""
    stream_resunet_width: int = 16
    """Width of the ResUNet-34 with 32 objectives, at the first of its cases."""
    tta_cases: str = "8x64,4x128"
    """BATCHxSIDE: images that are adapted to at once, each by itself."""
    tta_width: int = 32
    """Width of the ResUNet-34 that adapts to them."""
    overhead_pairs: int = 1000
    """Pairs of steps for the engine's overhead."""
    memory_width: int = 1024
    """Width of the four square layers whose peak memory is measured."""
    device: str = "cpu"
    """Where to compute, cpu or cuda; for cuda see also `python -m benchmarks.gpu`."""
    threads: int = 2
    """Threads of a CPU."""
    seed: int = 0
    """Seed of the bootstrap."""
    out: Path = Path("runs/benchmark-speed")
    """Folder of the results."""
    overwrite: bool = False
    """Replace the results of an earlier run in --out."""

    def run(self) -> None:
        """Measures, writes and prints the report."""
        parts = split_names("--parts", self.parts, PARTS)
        self._check()
        device = open_device(self.device, self.threads)
        problems = self._problems(device)
        adapted = self._adapted(device)
        objectives = _numbers("--objectives", self.objectives)
        rule_objectives = _numbers("--rule-objectives", self.rule_objectives)
        many = _numbers("--stream-objectives", self.stream_objectives)
        rules = exported_rules()
        if not self.overwrite:
            refuse_to_replace([self.out / "speed.json"])
        check_writable(self.out)
        load = os.getloadavg()[0]
        rate = bandwidth(device)
        rows: list[dict[str, Any]] = []
        networks = {problem.network: problem.parameters() for problem in problems}
        floors: list[dict[str, Any]] = []
        on_cuda: dict[str, list[Any]] = {"launches": [], "waits": []}
        rounds, clock = (
            Rounds(self.rounds, min(self.peer_rounds, self.rounds), self.seconds),
            Clock(device),
        )
        for comparison, problem in self._comparisons(problems, parts, objectives):
            where = {
                "network": problem.network, "case": problem.case, "method": comparison.method,
            }  # fmt: skip
            print(", ".join(where.values()), flush=True)
            summary = summarise(time_in_turn(comparison, clock, rounds), self.seed)
            for variant, numbers in summary.items():
                rows.append({"measure": RATIO, **where, "variant": variant, **numbers})
            floors.append(_floor(comparison, where, rate))
            if device.type == "cuda":
                on_cuda["launches"] += [{**where, **r} for r in cuda.launches_beyond(comparison)]
        if device.type == "cuda":
            on_cuda["waits"] = cuda.host_waits(problems[0])
        if "sharpness" in parts:
            for problem in problems:
                if problem.network.startswith(RESUNET):
                    # Where a case is for goals only, methods without one are left out.
                    most = 4 if problem.case in _cases(self.resunet_cases) else 2
                    rows += measure_sharpness(problem, clock, rounds, self.seed, most_passes=most)
        if "rules" in parts:
            for problem, chosen, count in self._rule_steps(rules, rule_objectives, device):
                rows += measure_rules(problem, chosen, count, clock, self.rule_rounds, self.seed)
        if "weights" in parts:
            rows += measure_weights(rules, clock, device, self.weight_seconds, self.seed)
        if "stream" in parts:
            for problem, count, width in self._with_many(many, device):
                rows += measure_many(problem, count, clock, rounds, self.seed)
                rows += measure_memory_of_many(problem, count, width, device, self.threads)
                networks[problem.network] = problem.parameters()
        if "tta" in parts:
            for problem in adapted:
                rows += measure_tta(problem, clock, rounds, self.seed)
                networks[problem.network] = problem.parameters()
        if "overhead" in parts:
            rows += measure_overhead(self.overhead_pairs, device, self.seed)
        if "memory" in parts:
            counts = objectives if "pcgrad" in parts else []
            rows += measure_memory(
                counts,
                "sam" in parts,
                self.memory_width,
                device,
                self.threads,
                with_gs_ema="gs_ema" in parts,
            )
            if "sharpness" in parts:
                rows += measure_memory_of_sharpness(self.memory_width, device, self.threads)
        goals = [*GOALS, *weight_goals(rules)]
        goals += [goal for count in rule_objectives for goal in rule_goals(rules, count)]
        record = {
            "command": self.command_line(),
            "machine": {
                **describe_machine(),
                "bandwidth": f"{rate:.1f} GB/s",
                "load at the start": f"{load:.1f}",
            },
            "peers": [TORCHJD, PYTORCH_OPTIMIZER],
            "memory environment": ENVIRONMENT,
            "networks": networks,
            "seed": self.seed,
            "rows": rows,
            "floors": floors,
            # The limits of time are meant for a CPU.
            "goals": judge(
                rows, [g for g in goals if device.type == "cpu" or "memory" in g.measure]
            ),
            "cuda": on_cuda if device.type == "cuda" else None,
        }
        text = report(record)
        write_results(record, text, self.out, "speed")
        plot(record, self.out / "speed.png")
        plot_slopes(record, self.out / "speed-objectives.png")
        print(text)
        print(f"The files are in {self.out}.")

    def command_line(self) -> str:
        """The command that measures this."""
        return command_line("speed", self)

    def _problems(self, device: torch.device) -> list[Problem]:
        """Every network at every case, one network after the other."""
        networks = split_names("--networks", self.networks, NETWORKS)
        problems: list[Problem] = []
        try:
            if "resunet" in networks:
                cases = _cases(self.resunet_cases, self.goal_cases)
                problems += [resunet(case, self.width, device) for case in cases]
            if "transformer" in networks:
                size = (self.transformer_width, self.transformer_layers)
                cases = _cases(self.transformer_cases)
                problems += [transformer(case, *size, device) for case in cases]
        except ValueError as error:
            raise UsageError(str(error)) from error
        return problems

    def _adapted(self, device: torch.device) -> list[Problem]:
        """Batches of images that are adapted to at once."""
        try:
            cases = _cases(self.tta_cases)
        except ValueError as error:
            raise UsageError(f"--tta-cases: {error}") from error
        return [resunet(case, self.tta_width, device) for case in cases]

    def _rule_steps(
        self, rules: Mapping[str, type[Rule]], objectives: list[int], device: torch.device
    ) -> Iterator[tuple[Problem, dict[str, type[Rule]], int]]:
        by_number = {
            name: rule
            for name, rule in rules.items()
            if rule is PCGrad or kind_of(rule) == "elementwise"
        }
        for count in objectives:
            for case in _cases(self.rule_cases):
                yield resunet(case, self.width, device), dict(rules), count
            for case in _cases(self.elementwise_cases):
                yield resunet(case, self.width, device), by_number, count

    def _check(self) -> None:
        """Makes sure that all numbers are in range.

        Raises:
            UsageError: One is not.
        """
        for name, least in (
            ("width", 1), ("transformer_width", 1), ("transformer_layers", 1), ("rounds", 1),
            ("peer_rounds", 0), ("rule_rounds", 1), ("stream_width", 1),
            ("stream_resunet_width", 1), ("tta_width", 1), ("overhead_pairs", 1),
            ("memory_width", 1), ("threads", 1), ("seed", 0),
        ):  # fmt: skip
            value, option = getattr(self, name), name.replace("_", "-")
            require(value >= least, f"--{option} is {value}; choose at least {least}")
        for name in ("width", "stream_resunet_width", "tta_width"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(value % 2 == 0, f"--{option} is {value}; choose an even number")
        require(
            self.transformer_width % 8 == 0,
            f"--transformer-width is {self.transformer_width}; choose a multiple of its 8 heads",
        )
        for name in ("seconds", "weight_seconds"):
            value, option = getattr(self, name), name.replace("_", "-")
            require(
                value >= 0 and math.isfinite(value),
                f"--{option} is {value}; choose a number of at least 0",
            )

    def _with_many(
        self, objectives: list[int], device: torch.device
    ) -> Iterator[tuple[Problem, int, int]]:
        for count in objectives:
            yield classifier(count, self.stream_width, device), count, self.stream_width
        width = self.stream_resunet_width
        for case in _cases(self.resunet_cases)[:1]:
            yield resunet(case, width, device), 32, width

    def _comparisons(
        self, problems: list[Problem], parts: list[str], objectives: list[int]
    ) -> Iterator[tuple[Comparison, Problem]]:
        seen: set[str] = set()
        for problem in problems:
            images = problem.x.dim() == 4
            all_of_it = not images or problem.case in _cases(self.resunet_cases)
            with_goal = {goal.method for goal in GOALS if goal.case == problem.case}
            if "pcgrad" in parts:
                for count in objectives:
                    if all_of_it or f"PCGrad, K = {count}" in with_goal:
                        yield pcgrad(problem, count), problem
            if "sam" in parts and (all_of_it or "SAM" in with_goal):
                yield sam(problem), problem
            if "grata" in parts and images and all_of_it:
                yield grata(problem), problem
            if "gs_ema" in parts and all_of_it:
                yield gs_ema(problem), problem
            if "stream" in parts and images and all_of_it:
                for name in exported(WEIGHTINGS):
                    yield weighting(problem, 4, name), problem
            if "gated_ema" in parts and problem.network not in seen:
                yield gated_ema(problem), problem
                yield sign_cosine(problem), problem
            seen.add(problem.network)


def _numbers(option: str, text: str) -> list[int]:
    texts = text.split(",")
    if not all(text.isdecimal() and int(text) >= 2 for text in texts):
        raise UsageError(f"{option} is {text!r}; give numbers from 2 on, such as 2,4,8")
    return [int(text) for text in texts]


def _cases(*texts: str) -> list[str]:
    cases = [case.strip() for text in texts for case in text.split(",") if case.strip()]
    for case in cases:
        parse_case(case)
    return list(dict.fromkeys(cases))


def _floor(comparison: Comparison, where: dict[str, str], rate: float) -> dict[str, Any]:
    traffic = comparison.traffic
    return {
        **where,
        "passes": comparison.passes,
        "parts": traffic.parts,
        "reads": traffic.reads,
        "writes": traffic.writes,
        "numbers": traffic.numbers,
        "milliseconds": traffic.milliseconds(rate),
    }
