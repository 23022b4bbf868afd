"""GS-EMA's three published rules, and others, on digits of two domains.

The source images are scikit-learn's digits, 8×8. The target images are the same ones (with
`--apart` others, drawn by themselves) with another contrast, noise and smoothing, drawn anew in
each step, as the paper makes its targets; labels are shared. The unseen domain, which is scored
only, has a gradient of brightness, strong smoothing and noise. It was fixed beforehand. The digits
are divided as in the benchmark of alignment.

A seed changes the network's first weights, the batches and the augmentations. Without a contrastive
loss, which is the only way from the teacher back to the student, all rules with one seed have the
same student, and differ in their averages alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradkit as gk
from benchmarks.alignment.digits import Pool, pool
from benchmarks.alignment.intervals import Interval, mean_interval, paired_interval
from benchmarks.alignment.jobs import run_jobs
from benchmarks.machine import describe_machine
from benchmarks.made_by import check_name, command_line, write_results
from benchmarks.tables import plus_minus
from examples.common.usage import check_writable, refuse_to_replace, require

BATCH = 32
REFERENCE = "EMA 0.999"
TEXT: Mapping[str, Any] = {"measure": "cosine", "decay_conflict": None, "warmup": False}
RULES: Mapping[str, Mapping[str, Any]] = {
    "EMA 0.999": {"decay_aligned": 0.999, "decay_conflict": 0.999},
    "EMA 0.9": {"decay_aligned": 0.9, "decay_conflict": 0.9},
    "code": {},
    "code, inverted": {"invert": True},
    "text, 0.9": {**TEXT, "decay_aligned": 0.9},
    "text, 0.9999": {**TEXT, "decay_aligned": 0.9999},
    "Algorithm 1, 0.9": {**TEXT, "decay_aligned": 0.9, "invert": True},
    "Algorithm 1, 0.9999": {**TEXT, "decay_aligned": 0.9999, "invert": True},
}
"""The arguments of `gk.GatedEMA`; plain averages are gates without a difference."""
MEASURES = {"unseen": "unseen domain", "source": "source domain"}


class Network(nn.Module):
    """Two convolutions whose output is the latent, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and the latent."""
        latent: Tensor = self.encoder(images)
        return self.head(latent), latent


def target_of(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images in the simulated target domain, each with an appearance of its own."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

    smoothed = F.avg_pool2d(images, 3, stride=1, padding=1)
    share = uniform(0.0, 0.7)
    mixed = (1 - share) * images + share * smoothed
    noise = 0.2 * torch.randn(images.shape, generator=generator)
    return uniform(0.5, 1.5) * mixed.pow(uniform(0.6, 1.6)) + uniform(-0.2, 0.2) + noise


def unseen_of(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images in a domain that no training sees."""
    smoothed = F.avg_pool2d(images, 3, stride=1, padding=1)
    light = torch.linspace(0.3, 1.2, images.shape[-1])
    noise = 0.15 * torch.randn(images.shape, generator=generator)
    return 0.8 * smoothed * light + 0.4 * light.flip(0) + noise


@dataclass(frozen=True)
class Setting:
    """What all trainings have in common."""

    steps: int
    lr: float
    contrast: float
    apart: bool


@dataclass(frozen=True)
class _Job:
    rules: tuple[str, ...]
    seed: int
    setting: Setting


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The percentage of right answers."""
    logits, _ = network(images)
    return 100 * float((logits.argmax(-1) == classes).double().mean())


def train(job: _Job) -> list[dict[str, Any]]:
    """One training, with a teacher by each of its rules; the scores of student and teachers."""
    generator = torch.Generator().manual_seed(job.seed)
    digits, tested = pool("train"), pool("test")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        student = Network()
    base = torch.optim.Adam(student.parameters(), lr=job.setting.lr)
    gates = {rule: gk.GatedEMA(student, **RULES[rule]) for rule in job.rules}
    optimizer = gk.wrap(base, *gates.values(), model=student)
    teacher = gates[job.rules[0]].teacher
    for _ in range(job.setting.steps):
        optimizer.step(_objectives(student, teacher, digits, job.setting, generator))
    image, classes = tested.images[:, None], tested.classes
    unseen = unseen_of(image, torch.Generator().manual_seed(1000 + job.seed))
    rows: list[dict[str, Any]] = []
    for rule, gated in gates.items():
        row: dict[str, Any] = {"rule": rule, "seed": job.seed}
        for who, network in (("teacher", gated.teacher), ("student", student)):
            row[f"{who}, unseen"] = accuracy(network, unseen, classes)
            row[f"{who}, source"] = accuracy(network, image, classes)
        share = 100 * float(gated.state["aligned"]) / job.setting.steps
        row["aligned"] = None if rule.startswith("EMA") else share
        rows.append(row)
    return rows


def _objectives(
    student: nn.Module,
    teacher: nn.Module,
    digits: Pool,
    setting: Setting,
    generator: torch.Generator,
) -> Any:
    places = torch.randint(len(digits.classes), (BATCH,), generator=generator)
    source, classes = digits.images[places][:, None], digits.classes[places]
    classes_t, drawn = classes, source
    if setting.apart:
        places = torch.randint(len(digits.classes), (BATCH,), generator=generator)
        drawn, classes_t = digits.images[places][:, None], digits.classes[places]
    target = target_of(drawn, generator)

    def closure() -> dict[str, Tensor]:
        logits, latent = student(source)
        logits_t, latent_t = student(target)
        losses = {
            "source": F.cross_entropy(logits, classes),
            "target": F.cross_entropy(logits_t, classes_t),
        }
        if setting.contrast:
            with torch.no_grad():
                latents = teacher(source)[1], teacher(target)[1]
            contrast = gk.losses.boundary_aware_contrast(latent, latent_t, *latents)
            losses["contrast"] = setting.contrast * contrast
        return losses

    return closure


@dataclass(frozen=True)
class GSEMA:
    """Compare the update rules of GS-EMA's teacher on digits of two domains.

    Writes OUT/NAME.json and OUT/NAME.md.
    """

    seeds: int = 5
    """Number of seeds, counted from 0."""
    steps: int = 600
    """Steps of each training."""
    lr: float = 2e-3
    """Adam's learning rate."""
    contrast: float = 0.0
    """Weight of the boundary-aware contrast, in whose loss the teacher takes part."""
    apart: bool = False
    """Draw the target images by themselves: other digits than the source images."""
    workers: int = 1
    """Processes to run at the same time, one thread each; the results do not depend on it."""
    out: Path = Path("runs/benchmark-gsema")
    """Folder of the results."""
    name: str = "gsema"
    """Name of the results' files."""
    overwrite: bool = False
    """Replace the results of an earlier run in --out."""

    def run(self) -> None:
        """Runs the comparison, writes and prints the report."""
        require(self.seeds >= 2, f"--seeds is {self.seeds}; an interval needs at least 2")
        require(self.steps >= 1, f"--steps is {self.steps}; choose at least 1")
        require(self.workers >= 1, f"--workers is {self.workers}; choose at least 1")
        require(
            self.lr > 0 and math.isfinite(self.lr), f"--lr is {self.lr}; choose a positive number"
        )
        require(
            self.contrast >= 0 and math.isfinite(self.contrast),
            f"--contrast is {self.contrast}; choose a number of at least 0",
        )
        check_name(self.name)
        if not self.overwrite:
            refuse_to_replace([self.out / f"{self.name}.json"])
        check_writable(self.out)
        setting = Setting(self.steps, self.lr, self.contrast, self.apart)
        together = [(rule,) for rule in RULES] if self.contrast else [tuple(RULES)]
        jobs = [_Job(rules, seed, setting) for rules in together for seed in range(self.seeds)]
        rows = [row for found in run_jobs(train, jobs, self.workers, "GS-EMA") for row in found]
        record = {
            "command": self.command_line(),
            "machine": {**describe_machine(), "processes": str(self.workers)},
            "settings": {
                "seeds": self.seeds, "steps": self.steps, "lr": self.lr,
                "contrast": self.contrast, "apart": self.apart,
            },
            "rows": rows,
        }  # fmt: skip
        text = report(record)
        write_results(record, text, self.out, self.name)
        print(text)
        print(f"The files are in {self.out}.")

    def command_line(self) -> str:
        """The command that makes these results."""
        return command_line("gsema", self)


def report(record: Mapping[str, Any]) -> str:
    """The results as Markdown: means over seeds, and differences from the reference."""
    settings, rows = record["settings"], record["rows"]
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())

    def values(rule: str, key: str) -> list[Any]:
        return [row[key] for row in rows if row["rule"] == rule]

    lines: list[Sequence[str]] = []
    students = {key: values(REFERENCE, f"student, {key}") for key in MEASURES}
    teachers = {key: values(REFERENCE, f"teacher, {key}") for key in MEASURES}
    same = all(
        values(rule, f"student, {key}") == students[key] for rule in RULES for key in MEASURES
    )
    if same:
        means = [_pair(mean_interval(students[key])) for key in MEASURES]
        gaps = [_pair(paired_interval(students[key], teachers[key]), "+") for key in MEASURES]
        lines.append(("no EMA (the student)", *means, *gaps, "-"))
    for rule in RULES:
        own = [values(rule, f"teacher, {key}") for key in MEASURES]
        gaps = [
            "-" if rule == REFERENCE else _pair(paired_interval(each, teachers[key]), "+")
            for each, key in zip(own, MEASURES, strict=True)
        ]
        aligned = values(rule, "aligned")
        rate = "-" if None in aligned else _pair(mean_interval(aligned))
        lines.append((rule, *(_pair(mean_interval(each)) for each in own), *gaps, rate))
    titles = [*MEASURES.values(), *(f"{title}, minus {REFERENCE}" for title in MEASURES.values())]
    head = ("teacher", *titles, "aligned steps, %")
    table = [
        f"| {' | '.join(head)} |",
        f"|---|{'--:|' * (len(head) - 1)}",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    contrast = (
        f"The boundary-aware contrast has weight {settings['contrast']:g}, so that students "
        "depend on their teacher."
        if settings["contrast"]
        else "There is no contrastive loss, and the student of a seed is the same for all rules."
    )
    images = (
        "The target images are of other digits than the source images."
        if settings["apart"]
        else "The target images are the source images, transformed."
    )
    about = (
        f"Accuracy on test digits, %, mean of {settings['seeds']} seeds ± half of its 95% interval "
        f"(Student's); differences are taken seed by seed. {settings['steps']} steps of Adam at "
        f"learning rate {settings['lr']:g}, {BATCH} images of each domain a step. {images} "
        f"{contrast} An interval that includes 0 shows no difference; of twenty that are 0, one "
        "excludes it."
    )
    sections = [
        "# The rules of GS-EMA's teacher",
        f"Made by `{record['command']}`.\n\nMachine: {machine}.",
        about,
        "\n".join(table),
    ]
    return "\n\n".join(sections) + "\n"


def _pair(interval: Interval, sign: str = "") -> str:
    return plus_minus(interval.mean, interval.high - interval.mean, sign)
