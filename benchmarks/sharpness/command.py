"""The command `python -m benchmarks sharpness`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.made_by import command_line, write_results
from benchmarks.sharpness import digits, landscape
from benchmarks.sharpness.methods import METHODS, REFERENCE
from benchmarks.sharpness.plot import plot_digits, plot_landscape
from benchmarks.sharpness.report import lines_of, report
from benchmarks.sharpness.summary import summarise
from examples.common.command_line import interruptible
from examples.common.usage import check_writable, require, split_names


@dataclass(frozen=True)
class Sharpness:
    """Compare the sharpness-aware methods with plain SGD: accuracy, flatness and cost.

    Writes OUT/sharpness.json, OUT/sharpness.md, OUT/sharpness-landscape.png and
    OUT/sharpness-digits.png, and every training as it ends to OUT/trainings.jsonl. Where an earlier
    call was interrupted, or had fewer seeds or methods, it goes on; steps are timed anew.
    """

    methods: str = "all"
    """Names of gradkit's classes, separated by commas."""
    steps: int = digits.STEPS
    """Steps of each training on digits."""
    seeds: int = 5
    """Seeds of the test, counted from 0."""
    tuning_seeds: int = 2
    """Further seeds by which learning rate and radii are chosen on validation digits."""
    landscape_steps: int = landscape.STEPS
    """Steps on the landscape of two wells; 0 leaves it out."""
    workers: int = 1
    """Processes to run at the same time, one thread each; the results do not depend on it."""
    out: Path = Path("runs/benchmark-sharpness")
    """Folder of the results."""
    overwrite: bool = False
    """Train anew what an earlier run has left in --out."""

    def run(self) -> None:
        """Runs the comparison, writes and prints the report."""
        for option, number, least in (
            ("steps", self.steps, 1),
            ("seeds", self.seeds, 2),
            ("tuning-seeds", self.tuning_seeds, 1),
            ("landscape-steps", self.landscape_steps, 0),
            ("workers", self.workers, 1),
        ):
            require(number >= least, f"--{option} is {number}; choose at least {least}")
        names = list(METHODS)
        if self.methods != "all":
            names = split_names("--methods", self.methods, names)
        check_writable(self.out)
        kept = self.out / "trainings.jsonl"
        if self.overwrite:
            kept.unlink(missing_ok=True)
        torch.set_num_threads(1)
        with interruptible("the same command goes on", lambda: True):
            found = digits.compare(
                names, self.seeds, self.tuning_seeds, self.steps, self.workers, kept
            )
        rows: list[dict[str, Any]] = []
        if self.landscape_steps:
            rows, paths = landscape.run_landscape(
                [REFERENCE, *names], self.landscape_steps, self.workers
            )
            plot_landscape(rows, paths, self.out / "sharpness-landscape.png")
        record = {
            "command": self.command_line(),
            "machine": {**describe_machine(), "processes": str(self.workers)},
            "settings": {
                "steps": self.steps, "seeds": self.seeds, "tuning_seeds": self.tuning_seeds,
                "landscape_steps": self.landscape_steps,
            },
            "test digits": len(digits.examples("test").classes),
            "landscape": rows,
            "summary": summarise(found["rows"], self.steps),
            **found,
        }  # fmt: skip
        text = report(record)
        write_results(record, text, self.out, "sharpness")
        plot_digits(
            lines_of(record, "default"),
            lines_of(record, "chosen"),
            record["times"],
            self.out / "sharpness-digits.png",
        )
        print(text)
        print(f"The files are in {self.out}.")

    def command_line(self) -> str:
        """The command that makes these results."""
        return command_line("sharpness", self)
