"""The commands of the aneurysm example but for `compare`, as typed options and what they do.

Each command checks everything it was given before it computes or writes anything.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.aneurysm.data import (
    SYNTHETIC,
    available_centres,
    check,
    entries_of,
    lost,
    open_centre,
    to_grid_of,
)
from examples.aneurysm.inference import EMPTY, score_volumes
from examples.aneurysm.methods import METHODS
from examples.aneurysm.options import RESUME, TrainingOptions, check_methods, refuse_earlier
from examples.aneurysm.ranks import joined_ranks, local_device, rank
from examples.aneurysm.results import RESULT_FILES
from examples.aneurysm.synthetic.export import export as export_centres
from examples.aneurysm.training import fit, load_network
from examples.common import results as common
from examples.common.command_line import interruptible
from examples.common.metrics import OVERLAPS
from examples.common.nifti import Volume, read, write
from examples.common.results import Result, remove_results, write_json
from examples.common.tensorboard import ScalarWriter
from examples.common.training import LAST, Entry
from examples.common.usage import check_writable, open_device, require, require_empty, split_names

SCORES = (*OVERLAPS, EMPTY)


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Train one method at all centres but one; the best validation's network is OUT/best.pt.

    Under torchrun, processes train together. A folder that holds a training is refused, unless
    --resume goes on with it or --overwrite replaces it.
    """

    held_out: str = "centre_d"
    """Centre that is left out."""
    method: str = "gsema"
    """Method: supervised, nnunet, vaseg, feddg, cmdg, none, ema, gsema, bacl-v, bacl-b or bacl."""
    seed: int = 0
    """Seed of weights, split and patches."""
    out: Path = Path("runs/aneurysm")
    """Folder of the checkpoints; made if missing."""
    tensorboard: bool = False
    """Write losses and scores for TensorBoard to OUT/tensorboard, too."""
    resume: bool = False
    """Continue the training that is in OUT."""
    overwrite: bool = False
    """Train anew where OUT holds a training already."""

    def run(self) -> None:
        """Trains, and prints where the network is."""
        self.check()
        require(0 <= self.seed < 2**31, f"--seed is {self.seed}; choose one from 0 to 2147483647")
        split_names("--method", self.method, list(METHODS), single=True)
        check_methods([self.method], self.preset, self.teacher)
        split_names("--held-out", self.held_out, available_centres(self.data_root), single=True)
        require(
            not (self.resume and self.overwrite),
            "--resume continues the training in --out, --overwrite replaces it; choose one",
        )
        if self.resume:
            require(
                (self.out / LAST).exists(),
                f"there is no training to resume: {self.out / LAST} is missing; check --out, or "
                "leave --resume out",
            )
        elif not self.overwrite:
            refuse_earlier([self.out])
        sources = self.open_centres([self.held_out], scored=False)
        device = local_device(self.open_device())
        check_writable(self.out)
        kept = [self.resume]
        with ExitStack() as stack:
            stack.enter_context(joined_ranks(device))
            curves = None
            if self.tensorboard and rank() == 0:
                curves = stack.enter_context(ScalarWriter(self.out / "tensorboard"))
            stack.enter_context(interruptible(RESUME, lambda: any(kept)))

            def after(entry: Entry) -> None:
                kept.append(True)
                if curves is not None:
                    values = {name: value for name, value in entry.items() if name != "epoch"}
                    curves.add(values, int(entry["epoch"]))

            fitted = fit(
                sources,
                self.held_out,
                self.size,
                self.settings(self.method, self.seed),
                self.out,
                device,
                self.kind(),
                self.resume,
                f"{self.method} without {self.held_out}",
                on_epoch=after,
            )
            if rank() == 0:
                print(f"network of the best validation: {fitted.best}")


@dataclass(frozen=True)
class Evaluate:
    """Segment the volumes of one centre with a trained network, and score them.

    Writes OUT/results.json, OUT/table.md and, with --save, the labels of each volume as NIfTI on
    the grid of its image. Scores are of the resampled volumes that the network sees; volumes for
    which the list has no label are segmented, not scored.
    """

    checkpoint: Path
    """best.pt of a training."""
    data_root: str = "synthetic"
    """Folder of datalist.json, or "synthetic" for generated angiograms."""
    centre: str | None = None
    """Centre to segment; default: the one that the training left out."""
    volumes: int = 10
    """Synthetic volumes; all of a folder's are used."""
    save: bool = False
    """Write the labels to OUT/labels."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU."""
    out: Path = Path("runs/aneurysm-evaluate")
    """Folder of the results; made if missing."""

    def run(self) -> None:
        """Evaluates, and prints the table."""
        require(self.volumes >= 1, f"--volumes is {self.volumes}; choose at least 1")
        require(self.threads >= 1, f"--threads is {self.threads}; choose at least 1")
        network, architecture = load_network(self.checkpoint)
        centre = architecture.held_out if self.centre is None else self.centre
        split_names("--centre", centre, available_centres(self.data_root), single=True)
        size = architecture.size
        checked = check(self.data_root, [centre], size, unlabelled=[centre])
        note = lost(checked, size)
        if note is not None:
            print(note, file=sys.stderr)
        device = open_device(self.device, self.threads)
        check_writable(self.out)
        samples = open_centre(
            self.data_root, centre, size, length=self.volumes, labels=False, checked=checked
        )
        cases, predictions = score_volumes(
            network.to(device), samples, architecture.patch, device, architecture.mirror
        )
        remove_results(self.out, RESULT_FILES)
        result = Result({"checkpoint": str(self.checkpoint), "centre": centre}, cases)
        write_json([result], self.out / "results.json", SCORES)
        rows = [common.result_row(result, 0, OVERLAPS)]
        table = common.markdown_table(("centre",), SCORES, rows)
        (self.out / "table.md").write_text(f"{table}\n")
        if self.save:
            (self.out / "labels").mkdir(exist_ok=True)
            synthetic = self.data_root == SYNTHETIC
            originals = [] if synthetic else entries_of(self.data_root, centre, labels=False)
            for index, (case, label) in enumerate(zip(cases, predictions, strict=True)):
                name = case.case.removesuffix(".gz").removesuffix(".nii").replace("/", "_")
                volume = Volume(label.numpy().astype(np.uint8), np.eye(4))
                if originals:
                    volume = to_grid_of(read(originals[index].image), label)
                write(self.out / "labels" / f"{name}_label.nii.gz", volume)
        print(table)


@dataclass(frozen=True)
class Export:
    """Write synthetic angiograms and labels as NIfTI volumes with a MONAI datalist."""

    out: Path = Path("runs/aneurysm-synthetic")
    """New or empty folder."""
    centres: str = "centre_a,centre_b,centre_c,centre_d"
    """Synthetic centres, separated by commas."""
    volumes: int = 10
    """Volumes of each centre."""
    size: int = 128
    """Side of the cubic volumes, voxels."""
    seed: int = 0
    """Seed of the generator."""

    def run(self) -> None:
        """Writes the files, and prints where."""
        centres = split_names("--centres", self.centres, available_centres(SYNTHETIC))
        require(self.volumes >= 1, f"--volumes is {self.volumes}; choose at least 1")
        require(self.size >= 16, f"--size is {self.size}; choose at least 16 voxels")
        require(0 <= self.seed < 2**32, f"--seed is {self.seed}; choose one from 0 to 4294967295")
        require_empty(self.out)
        check_writable(self.out)
        export_centres(self.out, centres, self.volumes, self.size, self.seed)
        print(f"{len(centres)} centres of {self.volumes} volumes: {self.out}")
