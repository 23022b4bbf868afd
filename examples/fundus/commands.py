"""The commands of the fundus example, but for the comparison, as typed options and what they do.

Each command checks everything it was given before it computes or writes anything.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch.utils.data import Dataset

from examples.common.adaptation import adapt_online
from examples.common.command_line import interruptible
from examples.common.datasets import Sample, length
from examples.common.results import remove_results, write_json
from examples.common.training import LAST
from examples.common.usage import (
    UsageError,
    check_writable,
    open_device,
    require,
    require_empty,
    split_names,
)
from examples.fundus.data import SYNTHETIC, Masks, available_domains, check, open_domain
from examples.fundus.earlier import (
    EPOCHS,
    check_earlier,
    resumption_note,
)
from examples.fundus.fusion import describe, load_cup_ratio, require_cup_ratio
from examples.fundus.gate import measure_cup_ratio
from examples.fundus.heads import (
    STATISTICS,
    HeadSettings,
    describe_heads,
    load_heads_statistics,
    train_heads,
)
from examples.fundus.masks import save_masks
from examples.fundus.methods import METHODS, build_adapter
from examples.fundus.network import ENCODER_STRIDE, HEADS, ResUNet34
from examples.fundus.results import RESULT_FILES, SCORES, make_result, markdown_table
from examples.fundus.sample import DICE
from examples.fundus.source_model import Architecture, load_source_model, save_source_model
from examples.fundus.synthetic.export import export as export_domains
from examples.fundus.training import TrainingSettings, train_source
from examples.fundus.validation import (
    check_adaptation,
    check_counts,
    check_heads,
    check_training,
    open_source,
)

RESUME = "continue with --resume"
REPLACED = "the results of an earlier run in {} are replaced"


@dataclass(frozen=True)
class Train:
    """Train a source model and keep its best epoch at OUT/SOURCE.pt.

    A folder that holds a training or the centre's model is refused, unless --resume goes on with
    the training or --overwrite replaces it.
    """

    data_root: str = "synthetic"
    """Folder of the lists and images, or "synthetic" for generated photographs."""
    source: str = "centre_a"
    """Centre to train on."""
    size: int = 128
    """Side of the square images, pixels; a multiple of 32, at least 64."""
    width: int = 16
    """Channels of the network's first stage; 64 is the published network."""
    epochs: int | None = None
    """Passes over the training images; default 20, with --resume as many as the training has. More
    extend it: further epochs take the learning rates of the longer schedule."""
    batch_size: int = 8
    """Images per training step."""
    learning_rate: float = TrainingSettings.learning_rate
    """Learning rate of the first training epoch."""
    train_images: int | None = None
    """Images of the source's train list to use; default all (synthetic: 100)."""
    seed: int = 0
    """Seed of synthetic data, weights and training."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large images on an idle machine."""
    out: Path = Path("runs/fundus")
    """Folder of the results; made if missing."""
    resume: bool = False
    """Continue the training that is in OUT/training."""
    overwrite: bool = False
    """Train anew where OUT holds a training or model already: training files are replaced after
    the first epoch, the model after the last."""

    def run(self) -> None:
        """Trains, and prints where the checkpoint is."""
        check_training(self.size, self.width, self.epochs, self.batch_size, self.learning_rate)
        check_counts(seed=self.seed, threads=self.threads, train_images=self.train_images)
        split_names("--source", self.source, available_domains(self.data_root), single=True)
        check(self.data_root, [self.source])
        open_source(self.data_root, self.source, self.size, self.seed, self.train_images)
        open_device(self.device, self.threads)
        epochs = self.check_earlier()
        check_writable(self.out)
        self.fit(epochs)
        print(f"source model: {self.out / self.source}.pt")

    def check_earlier(self) -> int:
        """Makes sure that nothing of an earlier run is lost; returns the number of epochs in all.

        Raises:
            UsageError: there is nothing to resume, or something that would be replaced.
        """
        return check_earlier(
            self.out, self.source, self.epochs, self.resume, self.overwrite, EPOCHS
        )

    def fit(self, epochs: int) -> ResUNet34:
        """Trains without further checks, keeps the best epoch and returns it.

        Args:
            epochs: as `check_earlier` tells.

        Raises:
            KeyboardInterrupt: after Ctrl-C; with the remedy where an epoch is kept.
        """
        samples, _ = open_source(
            self.data_root, self.source, self.size, self.seed, self.train_images
        )
        settings = TrainingSettings(epochs, self.seed, self.batch_size, self.learning_rate)
        # A file of an earlier training does not count, unless it is what this one started from.
        last = self.out / "training" / LAST
        note = resumption_note(last, epochs) if self.resume else ""
        kept = [self.resume]
        with interruptible(RESUME, lambda: any(kept)):
            best = train_source(
                samples,
                Architecture(self.width, self.size, self.source),
                settings,
                last.parent,
                open_device(self.device, self.threads),
                self.resume,
                on_epoch=lambda entry: kept.append(True),
                on_resume=lambda: print(note, file=sys.stderr),
                root=SYNTHETIC if self.data_root == SYNTHETIC else "folder",
            )
        model, architecture = load_source_model(best)
        facts = describe(measure_cup_ratio(samples))
        save_source_model(self.out / f"{self.source}.pt", architecture, model.state_dict(), **facts)
        return model


@dataclass(frozen=True)
class Heads:
    """Train auxiliary heads for a source model; keep both at OUT/SOURCE.pt.

    The heads reproduce the image, remove noise from it, enlarge a smaller one, and tell how it was
    turned; detta and GraTa with other objectives adapt by them. They learn from images alone,
    without masks. The model segments as before, bit for bit. A folder that holds a training or the
    centre's model is refused, unless --resume goes on with the training or --overwrite replaces it.
    """

    checkpoint: Path
    """Source model, as `train` writes it."""
    data_root: str = "synthetic"
    """Folder of the lists and images, or "synthetic" for generated photographs."""
    source: str | None = None
    """Centre of the source model; default: as the checkpoint tells."""
    size: int | None = None
    """Side of the square images, pixels, a multiple of 64, at least 128; default: as the checkpoint
    tells."""
    epochs: int | None = None
    """Passes over the training images; default 20, with --resume as many as the training has. More
    extend it: further epochs take the learning rates of the longer schedule."""
    statistics: str = HeadSettings.statistics
    """Where batch normalisation takes its statistics in this training: test (those of each image by
    itself, with which detta and GraTa adapt by default), or source (the running ones)."""
    train_images: int | None = None
    """Images of the source's train list to use; default all (synthetic: 100)."""
    seed: int = 0
    """Seed of synthetic data, weights and training; that of the source training keeps the same
    images held out."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large images on an idle machine."""
    out: Path = Path("runs/fundus-heads")
    """Folder of the results; made if missing."""
    resume: bool = False
    """Continue the training that is in OUT/training."""
    overwrite: bool = False
    """Train anew where OUT holds a training or model already."""

    def run(self) -> None:
        """Trains, and prints where the checkpoint is and how good the heads are."""
        check_training(epochs=self.epochs)
        split_names("--statistics", self.statistics, STATISTICS, single=True)
        check_counts(seed=self.seed, threads=self.threads, train_images=self.train_images)
        model, architecture = load_source_model(self.checkpoint, size=self.size, source=self.source)
        size, source = told(self.checkpoint, architecture)
        # The super-resolution head reads images of half the size, whose deepest map needs variance.
        require(
            size >= 4 * ENCODER_STRIDE and size % (2 * ENCODER_STRIDE) == 0,
            f"the images of {self.checkpoint} are {size} pixels wide; heads need a multiple of "
            f"{2 * ENCODER_STRIDE} pixels, at least {4 * ENCODER_STRIDE}: train a source model "
            "with such a --size",
        )
        split_names("--source", source, available_domains(self.data_root), single=True)
        check(self.data_root, [source], "present")
        samples, _ = open_source(
            self.data_root, source, size, self.seed, self.train_images, masks="present"
        )
        device = open_device(self.device, self.threads)
        epochs = check_earlier(
            self.out, source, self.epochs, self.resume, self.overwrite, HeadSettings.epochs
        )
        check_writable(self.out)
        # A file of an earlier training does not count, unless it is what this one started from.
        last = self.out / "training" / LAST
        note = resumption_note(last, epochs) if self.resume else ""
        kept = [self.resume]
        with interruptible(RESUME, lambda: any(kept)):
            headed, entry = train_heads(
                samples,
                model,
                architecture,
                HeadSettings(epochs, self.seed, statistics=self.statistics),
                last.parent,
                device,
                self.resume,
                on_epoch=lambda entry: kept.append(True),
                on_resume=lambda: print(note, file=sys.stderr),
                root=SYNTHETIC if self.data_root == SYNTHETIC else "folder",
            )
        path = self.out / f"{source}.pt"
        ratio = load_cup_ratio(self.checkpoint)
        facts = {} if ratio is None else describe(ratio)
        facts |= describe_heads(self.statistics)
        headed_architecture = replace(architecture, auxiliary_heads=True)
        save_source_model(path, headed_architecture, headed.state_dict(), **facts)
        print(f"source model with heads: {path}")
        print(
            f"on images that were held out, with {self.statistics} statistics, after epoch "
            f"{entry['epoch']:g}:"
        )
        for head in HEADS:
            what = "right, of six" if head == "rotation" else "of the variance explained"
            print(f"  {head}: {entry[head]:.1f}% {what}")


def note_statistics(methods: Iterable[str], checkpoint: Path) -> None:
    """Says on standard error which methods use heads with other statistics than those of training.

    Args:
        methods: that are to run.
        checkpoint: a network with heads; nothing is said of files that do not tell.

    Raises:
        CheckpointError: the file is unreadable, or what it tells is invalid.
    """
    trained = load_heads_statistics(checkpoint)
    for method in methods:
        used = METHODS[method].statistics
        fitting = "test" if used == "test" else "source"  # running ones are the source's at first
        if METHODS[method].heads and trained not in (None, fitting):
            print(
                f"the heads of {checkpoint} were trained with {trained} statistics, and {method} "
                f"adapts with {used}; heads --statistics {fitting} trains better ones for it",
                file=sys.stderr,
            )


def told(checkpoint: Path, architecture: Architecture) -> tuple[int, str]:
    """Size of the images and source of a model, which a file or an option must tell.

    Raises:
        UsageError: neither does.
    """
    size, source = architecture.size, architecture.source
    if size is None or source is None:
        unknown = "size" if size is None else "source"
        raise UsageError(f"{checkpoint} does not tell its {unknown}; pass --{unknown}")
    return size, source


@dataclass(frozen=True)
class Adapt:
    """Adapt a source model to one target centre by one method, and keep the predicted masks.

    Writes OUT/results.json and, for each image, OUT/masks/TARGET/METHOD/IMAGE at the network's
    resolution: 255 background, 128 rim, 0 cup. Names of images that do not end in .png get this
    ending besides their own. Results and masks of the same kind from an earlier run are replaced.
    Images for which the lists name no mask are predicted, not scored.
    """

    checkpoint: Path
    """Source model, as `train` writes it."""
    target: str = "centre_b"
    """Centre to adapt to."""
    method: str = "grata"
    """Method: none, ptbn, tent, grata, or one of the others that compare knows; detta and
    detta-released need a checkpoint with auxiliary heads."""
    data_root: str = "synthetic"
    """Folder of the lists and images, or "synthetic" for generated photographs."""
    missing_masks: bool = False
    """Take images whose mask is not there, though the lists name it, as images without one."""
    statistics: str = "test"
    """Where tent and grata take batch normalisation's statistics: source, test, mixed:SHARE."""
    lr: float = 1e-4
    """Learning rate of tent and grata."""
    source: str | None = None
    """Centre of the source model; default: as the checkpoint tells."""
    size: int | None = None
    """Side of the square images, pixels; default: as the checkpoint tells."""
    target_images: int | None = None
    """Images of the target to use, from the start; default all (synthetic: 100)."""
    seed: int = 0
    """Seed of synthetic data and augmentation."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large images on an idle machine."""
    out: Path = Path("runs/fundus-adapt")
    """Folder of the results; made if missing."""

    def run(self) -> None:
        """Adapts, and prints the table."""
        split_names("--target", self.target, available_domains(self.data_root), single=True)
        split_names("--method", self.method, list(METHODS), single=True)
        check_adaptation(self.statistics, self.lr)
        check_counts(seed=self.seed, threads=self.threads, target_images=self.target_images)
        model, architecture = load_source_model(self.checkpoint, size=self.size, source=self.source)
        check_heads([self.method], architecture.auxiliary_heads)
        size, source = told(self.checkpoint, architecture)
        require(source != self.target, f"--target is {source}, the checkpoint's own source")
        check_training(size=size)
        masks: Masks = "present" if self.missing_masks else "listed"
        check(self.data_root, [self.target], masks)
        ratio = None
        if METHODS[self.method].ratio:
            ratio = require_cup_ratio(self.checkpoint, self._images_of(source, size))
        device = open_device(self.device, self.threads)
        check_writable(self.out)

        note_statistics([self.method], self.checkpoint)
        samples = open_domain(
            self.data_root, self.target, "all", size, self.seed, self.target_images, masks
        )
        adapter = build_adapter(
            self.method, model.to(device), self.statistics, self.lr, self.seed, ratio
        )
        stream = adapt_online(
            adapter,
            samples,
            device,
            DICE,
            range(length(samples)),
            f"{self.target}, {self.method}",
            target_first=METHODS[self.method].target_first,
        )
        if remove_results(self.out, RESULT_FILES):
            print(REPLACED.format(self.out), file=sys.stderr)
        save_masks(self.out / "masks" / self.target / self.method, stream)
        result = make_result(
            source, self.target, self.method, self.statistics, self.lr, self.seed, stream
        )
        write_json([result], self.out / "results.json", SCORES, "image")
        print(markdown_table([result], self.seed))

    def _images_of(self, source: str, size: int) -> Dataset[Sample] | None:
        """The source's training images, if they are in the root."""
        if source not in available_domains(self.data_root):
            return None
        check(self.data_root, [source])
        return open_source(self.data_root, source, size, self.seed, None)[0]


@dataclass(frozen=True)
class Export:
    """Write synthetic photographs and masks in the layout of GraTa's release."""

    out: Path = Path("runs/fundus-synthetic")
    """New or empty folder."""
    domains: str = "centre_a,centre_b,centre_c,centre_d,centre_e"
    """Synthetic centres, separated by commas."""
    count: int = 100
    """Photographs of each centre; half in its train list, half in its test list."""
    size: int = 256
    """Side of the square images, pixels."""
    seed: int = 0
    """Seed of the generator."""

    def run(self) -> None:
        """Writes the files, and prints where."""
        domains = split_names("--domains", self.domains, available_domains("synthetic"))
        require(self.count >= 2, f"--count is {self.count}; choose at least 2")
        require(self.size >= 16, f"--size is {self.size}; choose at least 16 pixels")
        check_counts(seed=self.seed)
        require_empty(self.out)
        check_writable(self.out)
        export_domains(self.out, domains, self.count, self.size, self.seed)
        print(f"{len(domains)} centres of {self.count} photographs: {self.out}")
