"""DiM part by part: its variants, and what is left of it without them, at sites without labels.

The trainings are those of `examples.prostate` and `examples.fundus.semi`, each with the same images
and the same first weights for all methods of a seed, so that methods are compared seed by seed.
DiM is a reconstruction; see `gradkit.DiM`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.alignment.intervals import Interval, mean_interval, paired_interval
from benchmarks.machine import describe_machine
from benchmarks.made_by import check_name, command_line, write_results
from benchmarks.tables import plus_minus
from examples.common.command_line import interruptible
from examples.common.metrics import mean
from examples.common.results import Result
from examples.common.usage import require
from examples.fundus.semi import TASK as FUNDUS
from examples.prostate.task import TASK as PROSTATE
from examples.semi.commands import GOES_ON, Experiment, Trainings, run_folder
from examples.semi.methods import parse_methods
from examples.semi.results import RECONSTRUCTED, score_sites
from examples.semi.task import SYNTHETIC, Task
from examples.semi.training import load_trained

TASKS: Mapping[str, Task] = {"prostate": PROSTATE, "fundus": FUNDUS}
METHODS = (
    "supervised", "fixmatch", "sam", "divergence", "dim",
    "dim:kl", "dim:reverse_kl", "dim:hellinger", "dim:pearson", "dim:neyman", "dim:tv",
    "dim:jeffreys",
    "dim:feature_gauss", "dim:critic",
    "dim:task", "dim:divergence", "dim:clean",
    "dim:looksam", "dim:msam",
)  # fmt: skip
"""Parts, then f-divergences, levels, ascents and cheaper ascents. `gan` is `js` and a constant, so
that its trainings would be those of `dim`."""
REFERENCES = ("fixmatch", "dim")
"""What methods are compared with, where it is there."""
PUBLISHED = {
    "prostate": {"size": 384, "width": 64, "iterations": 60000},
    "fundus": {"size": 256, "width": 64, "iterations": 30000},
}
"""Settings of DiM's and MiDSS's trainings, for the report."""
HIDDEN = ("device", "threads")
"""Options that do not change the results, and so are no part of the command that is printed."""


@dataclass(frozen=True)
class DiM(Experiment):
    """Train DiM's parts and variants over several seeds, and compare them seed by seed.

    Writes OUT/NAME.json, OUT/NAME.md and the trainings, to OUT/training. Where an earlier call was
    interrupted, or had fewer seeds or methods, it goes on.
    """

    task: Literal["prostate", "fundus"] = "prostate"
    """What is segmented."""
    methods: str = ",".join(METHODS)
    """Methods, separated by commas, as `python -m examples.prostate compare` takes them."""
    seeds: int = 5
    """Number of seeds, counted from 0."""
    out: Path = Path("runs/benchmark-dim")
    """Folder of the results."""
    name: str = "dim"
    """Name of the results' files."""

    def run(self) -> None:
        """Trains what is not there yet, tests, and writes and prints the report."""
        task = TASKS[self.task]
        methods = parse_methods(self.methods)
        require(self.seeds >= 2, f"--seeds is {self.seeds}; an interval needs at least 2")
        check_name(self.name)
        trainings = self.train_all(task, methods, self.seeds, self.out)
        with interruptible(GOES_ON, lambda: True):
            record = {
                "command": self.command_line(),
                "machine": describe_machine(),
                "settings": {
                    "task": self.task, "labelled": trainings.labelled,
                    "synthetic": self.data_root == SYNTHETIC, "labels": self.labels,
                    "seeds": self.seeds, "size": self.size, "width": self.width,
                    "iterations": self.iterations,
                },
                "rows": self._test(task, list(methods), trainings),
            }  # fmt: skip
        text = report(record)
        write_results(record, text, self.out, self.name)
        print(text)
        print(f"The files are in {self.out}.")

    def _test(self, task: Task, methods: Sequence[str], trainings: Trainings) -> list[Any]:
        """The scores of each training at each site."""
        data, labelled, device = trainings
        rows: list[dict[str, Any]] = []
        for text in methods:
            for seed in range(self.seeds):
                path = run_folder(self.out, text, labelled, seed) / "best.pt"
                trained = load_trained(path, task, device)
                teacher, student = (
                    score_sites(task, model, data.test, device, text, seed)
                    for model in (trained.teacher, trained.student)
                )
                best = min(len(trained.history) * self.every, self.iterations)
                for one, other in zip(teacher, student, strict=True):
                    rows.append({**_means(one), "student": other.score("dice"), "best": best})
        return rows

    def command_line(self) -> str:
        """The command that makes these results, with DATA for a folder of images."""
        return command_line("dim", self, HIDDEN)


def _means(result: Result) -> dict[str, Any]:
    scores = ("dice", "jaccard", "hd95", "asd")
    means = {name: result.score(name) for name in scores}
    return {**result.labels, "n": len(result.cases), **means}


def report(record: Mapping[str, Any]) -> str:
    """The results as Markdown: means over seeds, and differences from the references."""
    settings, rows = record["settings"], record["rows"]
    labelled = settings["labelled"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sites = list(dict.fromkeys(row["site"] for row in rows))
    others = [site for site in sites if site != labelled]

    def values(method: str, score: str, over: Sequence[str]) -> list[float]:
        """A score of each seed, averaged over sites."""
        own = [row for row in rows if row["method"] == method and row["site"] in over]
        seeds = dict.fromkeys(row["seed"] for row in own)
        return [mean([row[score] for row in own if row["seed"] == seed]) for seed in seeds]

    references = [name for name in REFERENCES if name in methods]
    head = ["method", "Dice", labelled, "other sites"]
    head += [f"Dice minus {name}" for name in references] + ["HD95", "student's Dice"]
    lines = []
    for method in methods:
        dice = values(method, "dice", sites)
        cells = [
            method, _pair(mean_interval(dice)), f"{mean(values(method, 'dice', [labelled])):.2f}",
            f"{mean(values(method, 'dice', others)):.2f}" if others else "-",
        ]  # fmt: skip
        for name in references:
            reference = values(name, "dice", sites)
            cells.append("-" if name == method else _pair(paired_interval(dice, reference), "+"))
        cells += [f"{mean(values(method, score, sites)):.2f}" for score in ("hd95", "student")]
        lines.append(f"| {' | '.join(cells)} |")
    table = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}", *lines]
    images = "generated" if settings["synthetic"] else "real"
    counts = {row["site"]: row["n"] for row in rows}
    about = (
        f"Dice in % and HD95 in pixels on the test images ({images}) of "
        f"{', '.join(f'{site} ({counts[site]})' for site in sites)}, averaged over sites, of the "
        f"mean teachers at their best validation on {labelled}, the site with "
        f"{settings['labels']} labelled images. Means over {settings['seeds']} seeds ± half of the "
        "95% interval (Student's); differences are taken seed by seed. A seed is of weights and "
        "batches; the images are the same. An interval that includes 0 shows no difference; of "
        "twenty that are 0, one excludes it."
    )
    size = (
        f"Images of {settings['size']} pixels a side, a U-Net of width {settings['width']}, "
        f"{settings['iterations']} iterations"
    )
    published = PUBLISHED[settings["task"]]
    if all(2 * settings[name] <= value for name, value in published.items()):
        size += ": far below the published settings"
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    sections = [
        f"# DiM part by part: {settings['task']}",
        f"Made by `{record['command']}`.\n\nMachine: {machine}.",
        f"{about} {size}.",
        "\n".join(table),
        RECONSTRUCTED,
    ]
    return "\n\n".join(sections) + "\n"


def _pair(interval: Interval, sign: str = "") -> str:
    return plus_minus(interval.mean, interval.high - interval.mean, sign)
