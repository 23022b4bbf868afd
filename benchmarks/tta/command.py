"""The command `python -m benchmarks tta`."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from benchmarks.alignment.jobs import run_jobs
from benchmarks.machine import describe_machine
from benchmarks.made_by import command_line
from benchmarks.tta import jobs as running
from benchmarks.tta.jobs import Job
from benchmarks.tta.plot import plot_cosines
from benchmarks.tta.report import report
from benchmarks.tta.setting import (
    Setting,
    SourceTraining,
    load_model,
    train_model,
    write_atomically,
)
from benchmarks.tta.tables import REFERENCES, Table, variants_of
from benchmarks.tta.tabulation import tabulate
from benchmarks.tta.variants import BETA, Variant
from examples.common.command_line import interruptible
from examples.common.usage import check_writable, open_device, require, split_names
from examples.fundus.data import SYNTHETIC, check
from examples.fundus.heads import digest
from examples.fundus.validation import check_training

MINUTE = 60.0


@dataclass(frozen=True)
class TTA:
    """Adapt every source model to every other centre, and make one of the tables.

    Writes OUT/jobs/seedN/SOURCE/TARGET/VARIANT.json for each job, with the scores of every image,
    and from these OUT/tableN.json, OUT/tableN.md and pictures. Tables share jobs. What is there is
    not done again: the same command goes on with an interrupted run.
    """

    table: Table
    """1: all methods; 2: objective and learning rate; 3: objectives in each other's place; 4:
    functions of the cosine; 5: pairs of objectives; 6: statistics, gradient methods, predictions;
    figure4: cosine with the gradient of the labels."""
    data_root: str = SYNTHETIC
    """Folder of the lists and images, or "synthetic" for generated photographs."""
    shift: float = 1.0
    """Strength of the shift between synthetic centres, from 0 (none) to 1."""
    size: int = 128
    """Side of the square images, pixels; a multiple of 32, at least 64."""
    width: int = 32
    """Channels of the network's first stage; 64 is the published network."""
    epochs: int = 20
    """Passes over the training images, where a source model is trained."""
    train_images: int | None = None
    """Images of a source's train list to use; default all (synthetic: 100)."""
    images: int | None = None
    """Images of each target to use, from the start; default all (synthetic: 100)."""
    seeds: int = 1
    """Number of seeds, counted from 0: of source models and of the methods' random numbers."""
    lr: float = BETA
    """β, the learning rate of TENT, GraTa and their variants; published methods have their own."""
    methods: str = "all"
    """Names of variants, separated by commas; No Adapt and PTBN are always there."""
    processes: int = 1
    """Processes to run at the same time, one thread each; the scores do not depend on it."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    models: Path | None = None
    """Folder of the source models, seedN/SOURCE/SOURCE.pt, where missing ones are trained; for seed
    0 also SOURCE.pt, or SOURCE.pth with the released names of tensors; default OUT/models."""
    heads: Path | None = None
    """Folder of the same source models with auxiliary heads, for variants that need them; default
    the folder of the source models."""
    out: Path = Path("runs/benchmark-tta")
    """Folder of the results."""

    def run(self) -> None:
        """Runs what is missing, writes and prints the table."""
        self._check()
        device = open_device(self.device)
        setting = self._setting(device)
        centres = setting.centres()
        require(len(centres) >= 2, f"{self.data_root} has one centre; at least 2 are needed")
        check(self.data_root, centres)
        variants = self._variants()
        self._check_earlier(setting)
        check_writable(self.out)
        write_atomically(self.out / "setting.json", json.dumps(setting.described()) + "\n")
        with interruptible("the same command goes on", lambda: True):
            self._train(setting, centres)
            variants = self._possible(setting, centres, variants)
            jobs = [
                Job(setting, seed, source, target, variant)
                for variant in variants
                for seed in range(self.seeds)
                for source in centres
                for target in centres
                if source != target
            ]
            failures = self._work(jobs)
        self._report(setting, jobs, failures)

    def command_line(self) -> str:
        """The command that makes this table."""
        return command_line("tta", self, ("device",))

    def _check(self) -> None:
        for option, number in (
            ("images", self.images),
            ("epochs", self.epochs),
            ("seeds", self.seeds),
            ("processes", self.processes),
        ):
            require(number is None or number >= 1, f"--{option} is {number}; choose at least 1")
        require(
            self.train_images is None or self.train_images >= 2,
            f"--train-images is {self.train_images}; choose at least 2",
        )
        require(
            self.lr > 0 and math.isfinite(self.lr), f"--lr is {self.lr}; choose a positive number"
        )
        require(
            0 <= self.shift <= 1,
            f"--shift is {self.shift}; choose a strength from 0 to 1",
        )
        require(
            self.shift == 1 or self.data_root == SYNTHETIC,
            f"--shift is for synthetic centres, not for {self.data_root}; leave it out",
        )
        check_training(size=self.size, width=self.width)

    def _setting(self, device: torch.device) -> Setting:
        models = self.out / "models" if self.models is None else self.models
        return Setting(
            self.data_root, self.shift, self.size, self.width, self.images, self.epochs,
            self.train_images, str(device), models, self.out, self.heads,
        )  # fmt: skip

    def _variants(self) -> list[Variant]:
        variants = variants_of(self.table, self.lr)
        if self.methods == "all":
            return variants
        by_name = {variant.name: variant for variant in variants}
        chosen = set(split_names("--methods", self.methods, list(by_name)))
        return [
            variant for name, variant in by_name.items() if name in chosen or name in REFERENCES
        ]

    def _check_earlier(self, setting: Setting) -> None:
        """Makes sure that results of other settings are not mixed in."""
        path = self.out / "setting.json"
        if not path.exists():
            return
        earlier, now = json.loads(path.read_text()), setting.described()
        for name in {**earlier, **now}:
            require(
                earlier.get(name) == now.get(name),
                f"the results in {self.out} were made with {name} {earlier.get(name)}, not "
                f"{now.get(name)}; choose another --out, so that no table mixes them",
            )

    def _train(self, setting: Setting, centres: Sequence[str]) -> None:
        """Trains the source models that are missing, and reads all of them."""
        pairs = [(seed, source) for seed in range(self.seeds) for source in centres]
        missing = [
            SourceTraining(setting, seed, source, progress=self.processes == 1)
            for seed, source in pairs
            if not setting.model_file(seed, source).exists()
        ]
        if missing:
            check_writable(setting.models)
            run_jobs(train_model, missing, self.processes, "source models", MINUTE)
        for seed, source in pairs:
            path = setting.model_file(seed, source)
            load_model(path, setting.width, setting.size, source, "cpu")

    def _possible(
        self, setting: Setting, centres: Sequence[str], variants: Sequence[Variant]
    ) -> list[Variant]:
        """The variants that the source models can run; says which are left out."""
        needy = [variant.name for variant in variants if variant.heads]
        headless = []
        for seed, source in product(range(self.seeds), centres) if needy else ():
            path, alone = (setting.model_file(seed, source, heads) for heads in (True, False))
            model, segments = (
                load_model(each, setting.width, setting.size, source, "cpu")
                for each in (path, alone)
            )
            if not model.auxiliary_heads:
                headless.append(path)
            require(
                digest(model.without_heads()) == digest(segments.without_heads()),
                f"{path} is not the source model {alone} with heads; train heads for that one",
            )
        if not headless:
            return list(variants)
        text = f"{headless[0]} has no auxiliary heads, which {', '.join(needy)} need"
        require(self.methods == "all" or not set(needy) & set(self.methods.split(",")), text)
        print(f"left out: {text}", file=sys.stderr)
        return [variant for variant in variants if not variant.heads]

    def _work(self, jobs: Sequence[Job]) -> list[str]:
        """Does the jobs that are not done; returns what went wrong."""
        failures: list[str] = []
        for part in running.rounds(jobs):
            missing = [job for job in part if job.result() is None]
            if not missing:
                continue
            found = run_jobs(
                running.attempt, missing, self.processes, f"table {self.table}", MINUTE
            )
            failures += [failure for failure in found if failure is not None]
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
        return failures

    def _report(self, setting: Setting, jobs: Sequence[Job], failures: Sequence[str]) -> None:
        """Writes the table from the jobs' files, and prints it."""
        record = {
            "table": self.table,
            "command": self.command_line(),
            "machine": {**describe_machine(), "processes": str(self.processes)},
            "setting": setting.described(),
            "seeds": self.seeds,
            "lr": self.lr,
            **tabulate(self.table, jobs),
            "failures": list(failures),
        }
        name = f"table{self.table}" if self.table != "figure4" else self.table
        name += "" if self.lr == BETA else f"@{self.lr:g}"
        if self.table == "figure4":
            plot_cosines(record["lines"], self.out / "tta-figure4.png")
        text = report(record)
        write_atomically(
            self.out / f"{name}.json", json.dumps(record, separators=(",", ":")) + "\n"
        )
        write_atomically(self.out / f"{name}.md", text)
        print(text)
        print(f"The files are in {self.out}.")
