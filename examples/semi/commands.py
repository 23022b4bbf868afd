"""The four commands of the semi-supervised examples, as typed options and what they do.

Each command checks everything it was given before it computes or writes anything.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from examples.common.checkpoint import load
from examples.common.command_line import interruptible
from examples.common.results import remove_results, write_json
from examples.common.training import BEST, LAST, check_settings, is_exhausted
from examples.common.usage import check_writable, open_device, require, require_empty, split_names
from examples.semi.data import Data, open_data, open_site
from examples.semi.folder import SPLITS, available_sites, check, splits_of, write
from examples.semi.methods import Method, parse_method
from examples.semi.network import STRIDE
from examples.semi.results import RESULT_FILES, markdown_table, score_site
from examples.semi.task import SYNTHETIC, Task
from examples.semi.training import (
    Run,
    Settings,
    check_details,
    describe,
    fit,
    load_trained,
    plain_settings,
)

GOES_ON = "the same command goes on from there"
REPLACED = "the results of an earlier run in {} are replaced"


@dataclass(frozen=True)
class Experiment:
    """The options that training and comparing have in common."""

    data_root: str = SYNTHETIC
    """Folder of the sites in MiDSS's layout, or "synthetic" for generated images."""
    labelled: str | None = None
    """Site whose images have labels; default: the first."""
    labels: int = 20
    """Number of its images whose labels are trained on."""
    sites: str | None = None
    """Sites to train and test on, separated by commas, the labelled one included; default: all."""
    size: int = 128
    """Side of the square images, pixels; a multiple of 16, at least 32. Published: 384 for the
    prostate, 256 for fundus photographs."""
    width: int = 16
    """Channels of the network's first stage; 64 is the published network."""
    iterations: int = 2000
    """Training steps. Published: 60000 for the prostate, 30000 for fundus photographs."""
    every: int = 100
    """Steps between two validations."""
    batch_size: int = Settings.batch_size
    """Labelled images of a step, and as many unlabelled ones."""
    accumulate: int = Settings.accumulate
    """Parts into which a batch is split, one after the other in memory."""
    learning_rate: float = Settings.learning_rate
    """Learning rate of the first step; a training of a few hundred steps needs a larger one."""
    decay: float = Settings.decay
    """Decay of the mean teacher."""
    consistency: float = Settings.consistency
    """Weight of the loss on unlabelled images at the end."""
    cutmix: bool = True
    """Mix unlabelled images by CutMix."""
    amplitude: bool = True
    """Give labelled images the low-frequency amplitudes of unlabelled ones."""
    rho: float = Settings.rho
    """Radius of the ascent of sharpness-aware methods."""
    divergence_weight: float = Settings.divergence_weight
    """Weight of the divergence at the end."""
    tolerance: float = Settings.tolerance
    """Divergence that is not penalised."""
    running: float = Settings.running
    """Decay of running class histograms, for divergences of class probabilities."""
    patience: int | None = None
    """Validations without a better one after which a training ends; default: never."""
    train_images: int | None = None
    """Images of each site's train list to use; default all (synthetic: 96)."""
    test_images: int | None = None
    """Images of each site's test list to use; default all (synthetic: 48)."""
    data_seed: int = 0
    """Seed of synthetic images."""
    amp: bool | None = None
    """Half precision in the forward pass; default: on a GPU only."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large images on an idle machine."""
    overwrite: bool = False
    """Train anew where --out holds a training; otherwise it goes on."""

    def check(self, task: Task) -> tuple[list[str], str]:
        """Checks the options that need no file but the names of the sites.

        Returns:
            The sites, and the labelled one of them.

        Raises:
            UsageError: an option is wrong.
            DataError: there are no sites.
        """
        check_size(self.size)
        require(self.width >= 1, f"--width is {self.width}; choose at least 1, such as 16 or 64")
        for name, least in (
            ("labels", 1), ("iterations", 1), ("every", 1), ("batch_size", 1), ("accumulate", 1),
            ("patience", 1), ("train_images", 2), ("test_images", 1), ("threads", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            require(
                value is None or value >= least, f"{option} is {value}; choose at least {least}"
            )
        require(
            self.batch_size % self.accumulate == 0,
            f"--accumulate is {self.accumulate}, which does not divide --batch-size "
            f"{self.batch_size}; choose a divisor",
        )
        check_seed("--data-seed", self.data_seed)
        for name in ("rho", "consistency", "divergence_weight", "tolerance"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            require(
                value >= 0 and math.isfinite(value),
                f"{option} is {value}; choose a number of at least 0",
            )
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"--learning-rate is {self.learning_rate}; choose a positive number",
        )
        for name in ("decay", "running"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} is {value}; choose at least 0 and less than 1")
        known = available_sites(task, self.data_root)
        sites = known if self.sites is None else split_names("--sites", self.sites, known)
        first = known[0] if task.sites[0] not in known else task.sites[0]
        labelled = split_names("--labelled", self.labelled or first, known, single=True)[0]
        require(
            labelled in sites,
            f"--sites leaves out the labelled {labelled}; add it, or give another --labelled",
        )
        return sites, labelled

    def open(self, task: Task, sites: Sequence[str], labelled: str) -> Data:
        """Checks and opens the images.

        Raises:
            DataError: a picture is wrong, or there are too few.
        """
        check(task, self.data_root, sites)
        return open_data(
            task,
            self.data_root,
            sites,
            labelled,
            self.labels,
            self.size,
            self.data_seed,
            self.train_images,
            self.test_images,
        )

    def settings(self, labelled: str, seed: int) -> Settings:
        """The hyper-parameters of the training with this seed."""
        same = {name: getattr(self, name) for name in asdict(Settings()) if hasattr(self, name)}
        return replace(Settings(), **same | {"labelled": labelled, "seed": seed})

    def train_all(
        self, task: Task, methods: Mapping[str, Method], seeds: int, out: Path
    ) -> "Trainings":
        """Trains every method with every seed, each in its folder below `out`.

        Where an earlier call was interrupted it goes on; what is finished is left as it is.

        Args:
            task: what is segmented.
            methods: by the words that they are written as.
            seeds: number of seeds, counted from 0.
            out: folder of the results.

        Raises:
            UsageError: an option is wrong.
            DataError: a picture is wrong, or there are too few.
            CheckpointError: `out` holds a training that cannot go on with these settings.
        """
        sites, labelled = self.check(task)
        runs = [(text, seed) for seed in range(seeds) for text in methods]
        folders = [run_folder(out, text, labelled, seed) for text, seed in runs]
        settings = [self.settings(labelled, seed) for _, seed in runs]
        if not self.overwrite:
            for folder, (text, _), each in zip(folders, runs, settings, strict=True):
                check_earlier(folder, task, methods[text], each, self.size, self.width)
        data = self.open(task, sites, labelled)
        device = open_device(self.device, self.threads)
        check_writable(out)
        if self.overwrite:
            for folder in folders:
                remove_training(folder)
        for folder, (text, _), each in zip(folders, runs, settings, strict=True):
            run = Run(task, data, methods[text], each, self.size, self.width, device)
            train_method(run, folder, text)
        return Trainings(data, labelled, device)


class Trainings(NamedTuple):
    """What several trainings have in common.

    Attributes:
        data: to train and test on.
        labelled: the site with labels.
        device: where to compute.
    """

    data: Data
    labelled: str
    device: torch.device


def check_size(size: int) -> None:
    """Checks the side of the images.

    Raises:
        UsageError: the network cannot take it.
    """
    # At 16 pixels the deepest map is a single pixel, which has no variance to normalise by.
    require(
        size >= 2 * STRIDE and size % STRIDE == 0,
        f"--size is {size}; choose a multiple of {STRIDE} pixels, at least {2 * STRIDE}",
    )


def check_seed(option: str, seed: int) -> None:
    """Checks a seed.

    Raises:
        UsageError: it is out of range.
    """
    require(0 <= seed < 2**32, f"{option} is {seed}; choose a number from 0 to {2**32 - 1}")


def run_folder(out: Path, text: str, labelled: str, seed: int) -> Path:
    """Where the training of a method is.

    Args:
        out: folder of the results.
        text: the method as it was written.
        labelled: the site with labels.
        seed: of the training.
    """
    return out / "training" / f"{text.replace(':', '-')}_{labelled}_{seed}"


def check_earlier(
    folder: Path, task: Task, method: Method, settings: Settings, size: int, width: int
) -> None:
    """Makes sure that a training that is in a folder can go on with these settings.

    Raises:
        CheckpointError: it is another one, or unreadable.
    """
    last = folder / LAST
    if last.exists():
        content = load(last)
        check_details(last, content, describe(task, size, width))
        found = content.get("settings")
        check_settings(
            last, found if isinstance(found, dict) else {}, plain_settings(settings, method)
        )


def remove_training(folder: Path) -> None:
    """Removes a training's files, and nothing else."""
    for path in [folder / LAST, folder / BEST, *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Train(Experiment):
    """Train one method and keep its best weights at OUT/training/METHOD_SITE_SEED/best.pt.

    Where an earlier call was interrupted, the same command goes on.
    """

    method: str = "fixmatch"
    """Method: supervised, fixmatch, sam, divergence or dim, with variants after colons, such as
    dim:kl, dim:feature_gauss:task or dim:looksam."""
    seed: int = 0
    """Seed of weights and batches."""
    out: Path | None = None
    """Folder of the results; default runs/ and the task's name."""

    def run(self, task: Task) -> None:
        """Trains, and prints where the checkpoint is."""
        method = parse_method(self.method, "--method")
        check_seed("--seed", self.seed)
        sites, labelled = self.check(task)
        out = self.out or Path("runs") / task.name
        settings = self.settings(labelled, self.seed)
        folder = run_folder(out, self.method, labelled, self.seed)
        if not self.overwrite:
            check_earlier(folder, task, method, settings, self.size, self.width)
        data = self.open(task, sites, labelled)
        device = open_device(self.device, self.threads)
        check_writable(out)
        if self.overwrite:
            remove_training(folder)
        best = train_method(
            Run(task, data, method, settings, self.size, self.width, device), folder, self.method
        )
        print(f"best weights: {best}")


def train_method(run: Run, folder: Path, text: str) -> Path:
    """Trains with progress, and tells after Ctrl-C how to go on.

    Args:
        run: what to train.
        folder: of this training.
        text: the method as it was written.
    """
    last = folder / LAST
    if last.exists():
        history, settings = load(last)["history"], run.settings
        after = f"after {len(history)} validations"
        if len(history) >= settings.epochs or is_exhausted(history, run.select, settings.patience):
            note = f"{folder} is finished {after}; --overwrite trains anew"
        else:
            note = f"going on with {folder} {after}"
        print(note, file=sys.stderr)
    with interruptible(GOES_ON, last.exists):
        return fit(run, folder, f"{text}, {run.settings.labelled}, seed {run.settings.seed}")


@dataclass(frozen=True)
class Evaluate:
    """Test a checkpoint on the test lists of sites.

    Writes OUT/results.json and OUT/table.md; results of an earlier run there are replaced.
    """

    checkpoint: Path
    """best.pt of a training."""
    data_root: str = SYNTHETIC
    """Folder of the sites in MiDSS's layout, or "synthetic" for generated images."""
    sites: str | None = None
    """Sites to test on, separated by commas; default: all that have test images."""
    student: bool = False
    """Test the student, not the mean teacher."""
    test_images: int | None = None
    """Images of each site's test list to use; default all (synthetic: 48)."""
    data_seed: int = 0
    """Seed of synthetic images."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large images on an idle machine."""
    out: Path | None = None
    """Folder of the results; default runs/ and the task's name with -evaluate."""

    def run(self, task: Task) -> None:
        """Tests, and prints the table."""
        known = [
            site
            for site in available_sites(task, self.data_root)
            if "test" in splits_of(task, self.data_root, site)
        ]
        require(bool(known), f"{self.data_root} has no site with a folder test; put images there")
        sites = known if self.sites is None else split_names("--sites", self.sites, known)
        require(
            self.test_images is None or self.test_images >= 1,
            f"--test-images is {self.test_images}; choose at least 1",
        )
        require(self.threads >= 1, f"--threads is {self.threads}; choose at least 1")
        check_seed("--data-seed", self.data_seed)
        device = open_device(self.device, self.threads)
        trained = load_trained(self.checkpoint, task, device)
        check(task, self.data_root, sites)
        out = self.out or Path("runs") / f"{task.name}-evaluate"
        check_writable(out)
        model = trained.student if self.student else trained.teacher
        method = str(trained.method)
        results = []
        for site in sites:
            samples = open_site(
                task, self.data_root, site, "test", trained.size, self.data_seed, self.test_images
            )
            labels = {"method": method, "site": site, "seed": trained.settings["seed"]}
            results.append(score_site(task, model, samples, device, labels))
        table = markdown_table(task, results, trained.size)
        if remove_results(out, RESULT_FILES):
            print(REPLACED.format(out), file=sys.stderr)
        write_json(results, out / "results.json", list(results[0].cases[0].scores), "image")
        (out / "table.md").write_text(table)
        print(table)


@dataclass(frozen=True)
class Export:
    """Write synthetic images and masks in MiDSS's layout."""

    out: Path | None = None
    """New or empty folder; default runs/ and the task's name with -synthetic."""
    sites: str | None = None
    """Synthetic sites, separated by commas; default: all."""
    train_images: int = 96
    """Images of each site's train list."""
    test_images: int = 48
    """Images of each site's test list."""
    size: int | None = None
    """Side of the square images, pixels; default: as published."""
    data_seed: int = 0
    """Seed of the generator."""

    def run(self, task: Task) -> None:
        """Writes the files, and prints where."""
        known = list(task.sites)
        sites = known if self.sites is None else split_names("--sites", self.sites, known)
        counts = dict(zip(SPLITS, (self.train_images, self.test_images), strict=True))
        for split, count in counts.items():
            require(count >= 1, f"--{split}-images is {count}; choose at least 1")
        size = task.size if self.size is None else self.size
        require(size >= 16, f"--size is {size}; choose at least 16 pixels")
        check_seed("--data-seed", self.data_seed)
        out = self.out or Path("runs") / f"{task.name}-synthetic"
        require_empty(out)
        check_writable(out)
        for site in sites:
            for split, count in counts.items():
                samples = task.generate(site, split, count, size, self.data_seed)
                write(task, out, site, split, samples)
        print(f"{len(sites)} sites: {out}")
