"""Handwritten digits whose training labels are partly wrong.

scikit-learn's small digits, 8×8 pixels: 600 to train, 400 for validation, 797 to test. Of the
training labels 40% are replaced by another digit, drawn anew for each seed; those of validation and
test digits are right. A perceptron with two hidden layers can learn the wrong labels by heart, as
it does where the learning rate is large enough, and is then wrong on test digits.

What is chosen on validation digits, by seeds that the test does not use: for plain training the
learning rate and weight decay, which all methods then have; for each method with a radius that
radius, among multiples of its default. A method whose base has neither momentum nor weight decay
gets a learning rate of its own in the same way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gradkit as gk
from benchmarks.alignment.jobs import run_missing
from benchmarks.alignment.strategies import one_line
from benchmarks.sharpness.methods import FAILURES, METHODS, REFERENCE, build
from benchmarks.sharpness.summary import steps_of_as_many_gradients

STEPS = 250
BATCH = 50
TRAINING, VALIDATION = 600, 400
WRONG = 0.4
WIDTH = 128
MOMENTUM = 0.9
LRS = (0.02, 0.05, 0.1, 0.2, 0.5)
WEIGHT_DECAYS = (0.0, 1e-3, 5e-3)
PLAIN_LRS = (0.02, 0.05, 0.1, 0.2)
"""For bases without momentum."""
FACTORS = (0.5, 1.0, 2.0, 4.0)
"""The radii that are tried, as multiples of the default."""
TIMED, UNTIMED = 60, 5
"""Steps whose time is taken, and steps before them."""
TUNING_SEED = 1000
"""The first seed of the choices."""
RADIUS = 0.1
"""The radius at which the sharpness of every trained network is measured."""
Part = Literal["train", "validation", "test"]


class Examples(NamedTuple):
    """Images [n, 64] in [0, 1] and classes [n]."""

    images: Tensor
    classes: Tensor


@cache
def examples(part: Part) -> Examples:
    """The digits of a part with their right classes; each class has the same share of all parts."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().flatten(1) / 16
    classes = torch.from_numpy(data.target).long()
    split = partial(train_test_split, random_state=0)
    training, rest = split(
        torch.arange(len(classes)).numpy(), train_size=TRAINING, stratify=data.target
    )
    validation, test = split(rest, train_size=VALIDATION, stratify=data.target[rest])
    places = torch.from_numpy({"train": training, "validation": validation, "test": test}[part])
    return Examples(images[places], classes[places])


def with_wrong_labels(classes: Tensor, generator: torch.Generator) -> Tensor:
    """The classes [n], of which `WRONG` of all, drawn at random, are replaced by another."""
    places = torch.randperm(len(classes), generator=generator)[: round(WRONG * len(classes))]
    shifts = torch.randint(1, 10, (len(places),), generator=generator)
    changed = classes.clone()
    changed[places] = (classes[places] + shifts) % 10
    return changed


def network() -> nn.Sequential:
    """A perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def batches(number: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of examples without end, in a new order in each epoch."""
    while True:
        yield from torch.randperm(number, generator=generator).split(BATCH)


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        method: `REFERENCE` or one of `METHODS`.
        seed: For labels, first weights, batches and the method's random numbers.
        lr: Of the first step; it falls to 0 along a half cosine.
        weight_decay: Of the base optimizer, if it takes one.
        steps: How many.
        rho: The radius; None is the method's default.
        part: Where to score.
        measured: Whether to measure the sharpness at the end.
    """

    method: str
    seed: int
    lr: float
    weight_decay: float
    steps: int
    rho: float | None = None
    part: Part = "test"
    measured: bool = True


class Training:
    """A job's network, data and optimizer.

    Attributes:
        model: The network.
        images: All training images.
        labels: Their partly wrong labels.
        gradients: How many have been evaluated; that of a part of a batch counts as that part.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._generator = torch.Generator().manual_seed(job.seed)
        self.images, right = examples("train")
        self.labels = with_wrong_labels(right, self._generator)
        self.gradients = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.model = network()
        plain = job.method in METHODS and METHODS[job.method].plain
        momentum, weight_decay = (0.0, 0.0) if plain else (MOMENTUM, job.weight_decay)
        base = torch.optim.SGD(
            self.model.parameters(), lr=job.lr, momentum=momentum, weight_decay=weight_decay
        )
        arguments = {} if job.rho is None else {"rho": job.rho}
        chain = build(
            job.method, steps=job.steps, examples=len(self.labels), seed=job.seed, **arguments
        )
        self._optimizer = gk.wrap(base, *chain, model=self.model)
        by_sample = job.method in METHODS and METHODS[job.method].samples
        self._make_objective = self._by_sample if by_sample else self._mean

    def steps(self) -> Iterator[None]:
        """Takes the steps, one each time it is asked for the next item."""
        steps = self._job.steps
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        for places in islice(batches(len(self.labels), self._generator), steps):
            self._optimizer.step(self._make_objective(places))
            schedule.step()
            yield

    def _mean(self, places: Tensor) -> Callable[[], Tensor]:
        """The mean loss of a batch."""
        return lambda: self._loss(places, 1.0, "mean")

    def _by_sample(self, places: Tensor) -> Callable[..., Tensor]:
        """A loss for each sample of a batch, or for each that is chosen."""

        def losses(samples: Tensor | None = None) -> Tensor:
            chosen = places if samples is None else places[samples]
            return self._loss(chosen, len(chosen) / len(places), "none")

        return losses

    def _loss(self, places: Tensor, share: float, reduction: str) -> Tensor:
        """The loss at places, which count as a share of a gradient where there is one."""
        self.gradients += share * torch.is_grad_enabled()
        output = self.model(self.images[places])
        return F.cross_entropy(output, self.labels[places], reduction=reduction)


def train(job: Job) -> dict[str, Any]:
    """Runs one training.

    Returns:
        The job, the accuracies in % on its part and on the (partly wrong) training labels, the
        gradients of a step on average, the sharpness report over all training examples, and why it
        ended early if it did.
    """
    training = Training(job)
    taken, error = 0, None
    measures: dict[str, float] = {}
    try:
        for _ in training.steps():
            taken += 1
        if job.measured:
            measures = sharpness_of(training.model, training.images, training.labels)
    except FAILURES as failure:
        error = one_line(failure)
    scored = examples(job.part)
    return {
        "method": job.method,
        "seed": job.seed,
        "rho": job.rho,
        "lr": job.lr,
        "steps": job.steps,
        "accuracy": accuracy(training.model, scored.images, scored.classes),
        "fit": accuracy(training.model, training.images, training.labels),
        "gradients": training.gradients / max(taken, 1),
        **measures,
        "error": error,
    }


def step_times(jobs: Sequence[Job], rounds: int) -> dict[str, float]:
    """Each method's time of a step in units of the first job's, of processor time.

    All take a step in turn, so that they see the same machine; totals over the rounds are compared,
    since steps of some methods differ in cost.

    Args:
        jobs: One for each method, of at least as many steps.
        rounds: How many steps of each are timed, after some that are not.
    """
    trainings = [Training(job).steps() for job in jobs]
    seconds = [0.0] * len(jobs)
    for number in range(-UNTIMED, rounds):
        for place, training in enumerate(trainings):
            began = process_time()
            next(training)
            if number >= 0:
                seconds[place] += process_time() - began
    return {job.method: spent / seconds[0] for job, spent in zip(jobs, seconds, strict=True)}


def sharpness_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The loss on the training labels, how sharp it is, and the largest curvature and the trace."""
    found = gk.sharpness.report(
        lambda: F.cross_entropy(model(images), labels), model, rho=RADIUS, trace_samples=8
    )
    assert found.trace is not None
    return {
        "loss": found.loss,
        "sharpness": found.sharpness,
        "eigenvalue": found.eigenvalues[0],
        "trace": found.trace,
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The percentage of right answers."""
    return 100 * (model(images).argmax(-1) == classes).double().mean().item()


Choice = Mapping[str, float | None]
"""Arguments of a `Job`."""


def choose(
    candidates: Mapping[str, Sequence[Choice]],
    common: Mapping[str, Choice],
    seeds: int,
    steps: int,
    workers: int,
    kept: Path,
) -> tuple[dict[str, Choice], list[dict[str, Any]]]:
    """For each method the candidate with the best mean accuracy on validation digits.

    Args:
        candidates: What is tried for each method.
        common: Each method's other arguments.
        seeds: How many trainings of each candidate.
        steps: Of each training.
        workers: Processes at a time.
        kept: The file with the trainings that are done.

    Returns:
        The best candidates, and a row for each candidate.
    """
    tried = [(name, candidate) for name, own in candidates.items() for candidate in own]
    jobs = [
        Job(
            name,
            TUNING_SEED + seed,
            steps=steps,
            part="validation",
            measured=False,
            **{**common[name], **candidate},  # type: ignore[arg-type] # of the same names
        )
        for name, candidate in tried
        for seed in range(seeds)
    ]
    found = run_missing(train, jobs, workers, "validation", kept)
    rows: list[dict[str, Any]] = []
    for number, (name, candidate) in enumerate(tried):
        own = found[number * seeds : (number + 1) * seeds]
        scores = [0.0 if row["error"] else row["accuracy"] for row in own]
        rows.append({"method": name, **candidate, "validation": mean(scores)})
    best: dict[str, Choice] = {}
    for name, own_candidates in candidates.items():
        scores = [row["validation"] for row in rows if row["method"] == name]
        best[name] = own_candidates[scores.index(max(scores))]
    return best, rows


def compare(
    names: Sequence[str], seeds: int, tuning_seeds: int, steps: int, workers: int, kept: Path
) -> dict[str, Any]:
    """Chooses learning rate and radii on validation digits, then trains and tests every method.

    Args:
        names: The methods.
        seeds: Trainings of each that are tested.
        tuning_seeds: Trainings of each candidate.
        steps: Of each training.
        workers: Processes at a time.
        kept: The file with the trainings that are done, here or by an earlier call.

    Returns:
        The rows of the trainings, each with its variant: "default", "chosen" (the radius, where it
        is not the default one) or, for plain training, "longer" with as many gradients as a method;
        the times of a step; and what the choices were made from.
    """
    select = partial(choose, seeds=tuning_seeds, steps=steps, workers=workers, kept=kept)
    plain = [name for name in names if name in METHODS and METHODS[name].plain]
    grid: list[Choice] = [
        {"lr": lr, "weight_decay": decay} for lr in LRS for decay in WEIGHT_DECAYS
    ]
    own_grid: list[Choice] = [{"lr": lr, "weight_decay": 0.0} for lr in PLAIN_LRS]
    candidates = {REFERENCE: grid, **dict.fromkeys(plain, own_grid)}
    settings, tried = select(candidates, {name: {} for name in candidates})
    common = {name: settings.get(name, settings[REFERENCE]) for name in [REFERENCE, *names]}
    radii = {name: METHODS[name].radius for name in names if name != REFERENCE}
    tuned = {
        name: [{"rho": factor * radius} for factor in FACTORS]
        for name, radius in radii.items()
        if radius is not None
    }
    chosen, tried_radii = select(tuned, common)
    jobs: list[tuple[str, Job]] = []
    for name in [REFERENCE, *(name for name in names if name != REFERENCE)]:
        for seed in range(seeds):
            job = Job(name, seed, steps=steps, **common[name])  # type: ignore[arg-type] # as above
            jobs.append(("default", job))
            if name in chosen and chosen[name]["rho"] != radii[name]:
                jobs.append(("chosen", replace(job, rho=chosen[name]["rho"])))
    rows = _run(jobs, workers, "test", kept)
    costs: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        costs.setdefault((row["method"], row["variant"]), []).append(row["gradients"])
    lengths = {steps_of_as_many_gradients(steps, mean(own)) for own in costs.values()}
    reference = [job for _, job in jobs if job.method == REFERENCE]
    longer = [
        ("longer", replace(job, steps=length))
        for length in sorted(lengths)
        if length > steps
        for job in reference
    ]
    rows += _run(longer, workers, "longer", kept)
    firsts = {job.method: job for _, job in reversed(jobs)}  # with the default radius
    timed = [replace(firsts[name], steps=TIMED + UNTIMED) for name in [REFERENCE, *names]]
    return {
        "rows": rows,
        "times": step_times(timed, TIMED),
        "setting": dict(common[REFERENCE]),
        "tried": [*tried, *tried_radii],
    }


def _run(
    jobs: Sequence[tuple[str, Job]], workers: int, title: str, kept: Path
) -> list[dict[str, Any]]:
    found = run_missing(train, [job for _, job in jobs], workers, title, kept)
    return [{"variant": kind, **row} for (kind, _), row in zip(jobs, found, strict=True)]
