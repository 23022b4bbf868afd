"""The command that compares methods by leave-one-centre-out, the example's main one."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch.utils.data import Dataset

from examples.aneurysm.commands import SCORES
from examples.aneurysm.data import available_centres
from examples.aneurysm.figures import (
    Shown,
    pooled_latents,
    save_gates,
    save_latents,
    save_projections,
)
from examples.aneurysm.methods import METHODS
from examples.aneurysm.options import RESUME, TrainingOptions, check_methods, refuse_earlier
from examples.aneurysm.patches import PatchDataset
from examples.aneurysm.ranks import joined_ranks, local_device, rank
from examples.aneurysm.results import RESULT_FILES, markdown_table
from examples.aneurysm.tested import SHOWN, Tested, score_network
from examples.aneurysm.training import Fitted, fit, load_network
from examples.common.command_line import interruptible
from examples.common.datasets import Sample, length
from examples.common.results import Result, remove_results, write_json
from examples.common.usage import check_writable, require, split_names

LATENT_METHODS = ("ema", "gsema", "bacl")
"""Whose latents are drawn, where they are compared; the paper draws the first two."""
LATENT_PATCHES = 40  # of each centre


@dataclass(frozen=True)
class Compare(TrainingOptions):
    """Train methods at all centres but one, test them there, and compare.

    Writes OUT/results.json, OUT/table.md, OUT/projections.png, OUT/latents.png (where ema or gsema
    is compared), OUT/gate.png (where a method has two domains), and trainings with their scores to
    OUT/training/METHOD-CENTRE-SEED.
    """

    methods: str = "none,ema,gsema,bacl"
    """Methods, separated by commas: supervised, nnunet, vaseg, feddg, cmdg, none, ema, gsema,
    bacl-v, bacl-b, bacl."""
    held_out: str = "centre_d"
    """Centres to hold out, one after the other, separated by commas; "all" is each of them."""
    seeds: int = 1
    """How often each training is repeated, with seeds 0, 1, …; the synthetic data stay the same."""
    out: Path = Path("runs/aneurysm-compare")
    """Folder of the results; made if missing."""
    resume: bool = False
    """Go on with an earlier comparison: trainings in OUT are used, finished or not, and so are the
    scores of finished ones."""
    overwrite: bool = False
    """Train anew where OUT holds trainings already."""

    def run(self) -> None:
        """Compares, and prints the table."""
        self.check()
        require(self.seeds >= 1, f"--seeds is {self.seeds}; choose at least 1")
        methods = split_names("--methods", self.methods, list(METHODS))
        check_methods(methods, self.preset, self.teacher)
        known = available_centres(self.data_root)
        held_out = known
        if self.held_out != "all":
            held_out = split_names("--held-out", self.held_out, known)
        require(
            not (self.resume and self.overwrite),
            "--resume goes on with the trainings in --out, --overwrite replaces them; choose one",
        )
        runs = list(product(held_out, range(self.seeds), methods))
        if not (self.resume or self.overwrite):
            refuse_earlier([self.folder(*run) for run in runs])
        centres = self.open_centres(held_out)
        device = local_device(self.open_device())
        check_writable(self.out)
        with joined_ranks(device), interruptible(RESUME, lambda: True):
            if self.overwrite and rank() == 0:
                for run in runs:
                    shutil.rmtree(self.folder(*run), ignore_errors=True)
            self._compare(centres, runs, methods, device)

    def folder(self, held_out: str, seed: int, method: str) -> Path:
        """Where a training is."""
        return self.out / "training" / f"{method}-{held_out}-{seed}"

    def _compare(
        self,
        centres: Mapping[str, Dataset[Sample]],
        runs: Sequence[tuple[str, int, str]],
        methods: Sequence[str],
        device: torch.device,
    ) -> None:
        """Trains, tests, and writes what came of it."""
        results = []
        fitted: dict[str, Fitted] = {}
        predictions: dict[tuple[str, str], Tested] = {}
        first, _, _ = runs[0]
        for number, (centre, seed, method) in enumerate(runs, start=1):
            sources = {name: data for name, data in centres.items() if name != centre}
            trained = fit(
                sources,
                centre,
                self.size,
                self.settings(method, seed),
                self.folder(centre, seed, method),
                device,
                self.kind(),
                # A finished training is read again, and nothing is left to do.
                resume=self.resume,
                description=f"{number} of {len(runs)}: {method} without {centre}, seed {seed}",
            )
            if rank() > 0:
                continue
            tested = score_network(trained.best, centres[centre], device)
            results.append(Result({"method": method, "centre": centre, "seed": seed}, tested.cases))
            if seed == 0:
                predictions[centre, method] = tested
                if centre == first:
                    fitted[method] = trained
        if rank() > 0:
            return
        table = markdown_table(results)
        if remove_results(self.out, RESULT_FILES):
            print(f"the results of an earlier run in {self.out} are replaced", file=sys.stderr)
        write_json(results, self.out / "results.json", SCORES)
        (self.out / "table.md").write_text(table)
        save_projections(self.out / "projections.png", _shown(centres, predictions, methods))
        self._save_latents(centres, fitted, first, device)
        of_two = {
            name: each.record
            for name, each in fitted.items()
            if {"source", "target"} <= set(each.record.names)
        }
        if of_two:
            save_gates(self.out / "gate.png", of_two)
        print(table)

    def _save_latents(
        self,
        centres: Mapping[str, Dataset[Sample]],
        fitted: Mapping[str, Fitted],
        held_out: str,
        device: torch.device,
    ) -> None:
        """Draws the latents of patches round aneurysms, of all centres alike."""
        drawn = [name for name in LATENT_METHODS if name in fitted]
        if not drawn:
            return
        patches, labels = [], []
        for name, samples in centres.items():
            dataset = PatchDataset(
                [samples], self.patch, LATENT_PATCHES, 1.0, lambda image, *_: {"image": image}, 0
            )
            patches += [dataset[index]["image"] for index in range(LATENT_PATCHES)]
            labels += LATENT_PATCHES * [name]
        batch = torch.stack(patches)
        latents = {}
        for name in drawn:
            network, _ = load_network(fitted[name].best)
            latents[name] = pooled_latents(network.to(device), batch, device)
        save_latents(self.out / "latents.png", latents, labels, held_out)


def _shown(
    centres: Mapping[str, Dataset[Sample]],
    predictions: Mapping[tuple[str, str], Tested],
    methods: Sequence[str],
) -> list[Shown]:
    """The first cases of each held-out centre, whatever their scores."""
    rows = []
    for centre in dict.fromkeys(centre for centre, _ in predictions):
        for case in range(min(SHOWN, length(centres[centre]))):
            of_methods = {}
            for method in methods:
                tested = predictions[centre, method]
                of_methods[method] = tested.labels[case], tested.cases[case].scores["dsc"]
            rows.append(Shown(centre, centres[centre][case], of_methods))
    return rows
