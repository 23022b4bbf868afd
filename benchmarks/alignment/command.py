"""The command `python -m benchmarks alignment`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.alignment import digits, fronts, fundus, toy
from benchmarks.alignment.plot import plot_differences, plot_front, plot_toy
from benchmarks.alignment.report import report
from benchmarks.alignment.strategies import REFERENCE, STRATEGIES, suitable
from benchmarks.alignment.summary import summarise
from benchmarks.machine import describe_machine
from benchmarks.made_by import command_line, write_results
from examples.common.usage import check_writable, refuse_to_replace, require, split_names
from examples.fundus.data import available_domains, check
from examples.fundus.validation import check_training

Problem = Literal["toy", "fonseca", "zdt", "digits", "fundus"]
OWN_OPTIONS = {
    "seeds": ("fonseca", "zdt", "digits", "fundus"),
    "validation": ("digits",),
    "data": ("fundus",),
    "held_out": ("fundus",),
    "images": ("fundus",),
    "size": ("fundus",),
    "width": ("fundus",),
}
"""Which problems an option is for, where it is not for all."""


@dataclass(frozen=True)
class Alignment:
    """Compare gradkit's ways of joining objectives, each with its default settings.

    Writes OUT/PROBLEM.json, OUT/PROBLEM.md and pictures.
    """

    problem: Problem
    """toy: two basins in the plane; fonseca and zdt: known fronts; digits: two digits and their
    parity; fundus: centres of photographs, scored on one that is held out."""
    strategies: str = "all"
    """Names of gradkit's classes, separated by commas. Sum, which others are compared with, is
    always in digits and fundus."""
    steps: int | None = None
    """Steps of each run; default: toy 5000, fonseca, zdt and digits 1000, fundus 300."""
    lr: float | None = None
    """Adam's learning rate, the same for all strategies; default: toy 0.005, fonseca 0.02, zdt
    0.05, digits 0.005, fundus 0.002."""
    seeds: int | None = None
    """Number of seeds, counted from 0; for fonseca and zdt of starts; default: fonseca and zdt 10,
    digits 5, fundus 2."""
    validation: bool = False
    """digits: score on validation digits in the place of test digits."""
    data: str | None = None
    """fundus: folder of the lists and images, or "synthetic"; must be given."""
    held_out: str | None = None
    """fundus: centres to hold out, one after the other, separated by commas; default all."""
    images: int | None = None
    """fundus: images of each list to use; default all."""
    size: int = 64
    """fundus: side of the square images, pixels."""
    width: int = 16
    """fundus: channels of the network's first stage."""
    workers: int = 1
    """Processes to run at the same time, one thread each; the results do not depend on it."""
    out: Path | None = None
    """Folder of the results; default runs/benchmark-alignment/PROBLEM."""
    overwrite: bool = False
    """Replace the results of an earlier run in --out."""

    def run(self) -> None:
        """Runs the comparison, writes and prints the report."""
        self._check()
        out = self.out or Path("runs/benchmark-alignment") / self.problem
        if not self.overwrite:
            refuse_to_replace([out / f"{self.problem}.json"])
        solve: Mapping[Problem, Callable[[Path], dict[str, Any]]] = {
            "toy": self._toy,
            "fonseca": self._fronts,
            "zdt": self._fronts,
            "digits": self._digits,
            "fundus": self._fundus,
        }
        torch.set_num_threads(1)
        record = {
            "problem": self.problem,
            "command": self.command_line(),
            "machine": {**describe_machine(), "processes": str(self.workers)},
            **solve[self.problem](out),
        }
        text = report(record)
        write_results(record, text, out, self.problem)
        print(text)
        print(f"The files are in {out}.")

    def command_line(self) -> str:
        """The command that makes these results."""
        return command_line("alignment", self)

    def _check(self) -> None:
        for field in fields(self):
            problems = OWN_OPTIONS.get(field.name, (self.problem,))
            require(
                self.problem in problems or getattr(self, field.name) == field.default,
                f"--{field.name.replace('_', '-')} is not for {self.problem}, but for "
                f"{', '.join(problems)}; leave it out",
            )
        for option, number in (
            ("steps", self.steps),
            ("seeds", self.seeds),
            ("images", self.images),
            ("workers", self.workers),
        ):
            require(number is None or number >= 1, f"--{option} is {number}; choose at least 1")
        require(
            self.lr is None or (self.lr > 0 and math.isfinite(self.lr)),
            f"--lr is {self.lr}; choose a positive number",
        )

    def _names(self, objectives: int, compared: bool) -> list[str]:
        choices = suitable(objectives)
        if self.strategies == "all":
            return choices
        given = [name.strip() for name in self.strategies.split(",")]
        too_few = [name for name in given if name in STRATEGIES and name not in choices]
        require(
            not too_few,
            f"{', '.join(too_few)} is for more objectives than the {objectives} of {self.problem}; "
            "leave it out",
        )
        names = split_names("--strategies", self.strategies, choices)
        return names if not compared or REFERENCE in names else [REFERENCE, *names]

    def _toy(self, out: Path) -> dict[str, Any]:
        names = self._names(toy.OBJECTIVES, compared=False)
        check_writable(out)
        lr, steps = self.lr or toy.LR, self.steps or toy.STEPS
        rows, paths = toy.run_toy(names, lr, steps, self.workers)
        plot_toy(rows, paths, out / "toy.png")
        return {
            "title": "Two basins in the plane",
            "about": (
                f"{steps} steps of Adam at learning rate {lr:g} from each of {len(toy.STARTS)} "
                f"starts. A start reaches the front if both losses end within {toy.TOLERANCE:g} of "
                "one of its points, or better."
            ),
            "settings": {"lr": lr, "steps": steps, "starts": toy.STARTS},
            "rows": rows,
        }

    def _fronts(self, out: Path) -> dict[str, Any]:
        names = self._names(fronts.OBJECTIVES, compared=False)
        check_writable(out)
        keys = [key for key in fronts.PROBLEMS if key.startswith(self.problem)]
        default = fronts.LR if self.problem == "fonseca" else fronts.ZDT_LR
        lr, steps = self.lr or default, self.steps or fronts.STEPS
        seeds = self.seeds or fronts.STARTS
        rows: list[dict[str, Any]] = []
        for key in keys:
            own = fronts.run_front(key, names, seeds, lr, steps, self.workers)
            plot_front(key, own, out / f"{key}.png")
            rows += own
        return {
            "title": "Known Pareto fronts",
            "titles": {key: fronts.PROBLEMS[key].title for key in keys},
            "about": (
                f"{steps} steps of Adam at learning rate {lr:g} from each of {seeds} random "
                "starts. Distances are from the final points to the front, in the plane of the "
                "objectives; the spread is the range of f1 that the final points cover; a point is "
                "Pareto-stationary if some weighted mean of the gradients, less what leads out of "
                f"the bounds, is no longer than {fronts.STATIONARY:g}."
            ),
            "settings": {"lr": lr, "steps": steps, "seeds": seeds},
            "rows": rows,
        }

    def _digits(self, out: Path) -> dict[str, Any]:
        names = self._names(digits.OBJECTIVES, compared=True)
        seeds = self.seeds or 5
        require(seeds >= 2, f"--seeds is {seeds}; an interval needs at least 2")
        check_writable(out)
        lr, steps = self.lr or digits.LR, self.steps or digits.STEPS
        part: digits.Part = "validation" if self.validation else "test"
        rows = digits.run_digits(names, seeds, lr, steps, part, self.workers)
        measures = {"mean": "mean of the tasks", **{task: task for task in digits.TASKS}}
        return self._trained(
            rows,
            measures,
            "percentage points",
            out,
            {
                "title": "Two digits and their parity",
                "about": (
                    f"Accuracy on {part} digits, %. {steps} steps of Adam, batch {digits.BATCH}, "
                    f"learning rate {lr:g} falling to 0 along a half cosine: one for all "
                    f"strategies, by default chosen for {REFERENCE} on validation "
                    "digits. Nothing is tuned for any other strategy."
                ),
                "settings": {"lr": lr, "steps": steps, "seeds": seeds, "part": part},
            },
        )

    def _fundus(self, out: Path) -> dict[str, Any]:
        require(self.data is not None, "--data is missing; give the folder of the lists and images")
        root = str(self.data)
        centres = available_domains(root)
        require(len(centres) >= 3, f"{root} has {len(centres)} centres; at least 3 are needed")
        names = self._names(len(centres) - 1, compared=True)
        held_out = split_names("--held-out", self.held_out or ",".join(centres), centres)
        seeds = self.seeds or 2
        require(
            seeds * len(held_out) >= 2,
            "one training has no interval; choose more --seeds or --held-out",
        )
        check_training(size=self.size, width=self.width)
        check(root, centres)
        check_writable(out)
        setting = fundus.Setting(
            root, self.size, self.width, self.images, self.lr or fundus.LR,
            self.steps or fundus.STEPS,
        )  # fmt: skip
        rows = fundus.run_fundus(names, held_out, seeds, setting, self.workers)
        return self._trained(
            rows,
            {"unseen": "unseen centre", "seen": "centres trained on"},
            "Dice in %",
            out,
            {
                "title": "Fundus photographs, a centre held out",
                "about": (
                    "Dice in %, mean of disc and cup, on test images of the centre held out and "
                    f"of the others; held out in turn: {', '.join(held_out)}, with {seeds} seeds "
                    f"each. ResUNet-34 of width {self.width}, images of {self.size} pixels a side, "
                    f"{setting.steps} steps of Adam, {fundus.BATCH} images of each centre a step, "
                    f"learning rate {setting.lr:g} falling to 0 along a half cosine for all "
                    "strategies. Trainings that share a centre or a seed are not independent: the "
                    "intervals are too narrow rather than too wide."
                ),
                "settings": {
                    "lr": setting.lr, "steps": setting.steps, "seeds": seeds,
                    "held out": held_out, "size": self.size, "width": self.width,
                    "images": self.images,
                },
            },
        )  # fmt: skip

    def _trained(
        self,
        rows: Sequence[Mapping[str, Any]],
        measures: Mapping[str, str],
        unit: str,
        out: Path,
        details: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The record of a problem whose rows are trainings; draws the differences."""
        summary = summarise(rows, list(measures))
        if any(f"{measure}, difference" in row for row in summary for measure in measures):
            plot_differences(summary, measures, unit, out / f"{self.problem}.png")
        return {**details, "measures": measures, "summary": summary, "rows": rows}
