"""The command that compares methods of semi-supervised training, the examples' main one."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.common.checkpoint import load
from examples.common.command_line import interruptible
from examples.common.results import Result, remove_results, write_json
from examples.common.training import LAST, Entry
from examples.common.usage import check_writable, open_device, require
from examples.semi.commands import (
    GOES_ON,
    REPLACED,
    Experiment,
    check_earlier,
    remove_training,
    run_folder,
    train_method,
)
from examples.semi.data import Data
from examples.semi.figures import save_curves, save_features, save_predictions
from examples.semi.methods import METHODS, Method, parse_method
from examples.semi.network import UNet
from examples.semi.results import RESULT_FILES, markdown_table, score_site
from examples.semi.task import Task
from examples.semi.training import Run, load_trained

WITHOUT_DIVERGENCE = {"dim": "sam", "divergence": "fixmatch"}
"""The method that another one adds the divergence to."""


@dataclass(frozen=True)
class Compare(Experiment):
    """Train several methods with several seeds, test them at every site, and compare.

    Writes OUT/results.json and OUT/student.json (of the mean teachers and of the students),
    OUT/table.md, OUT/curves.png, OUT/predictions.png, OUT/tsne.png (where a method is there with
    and without the divergence) and the trainings. Results of an earlier run are replaced. Where an
    earlier call was interrupted, the same command goes on.
    """

    methods: str = ",".join(METHODS)
    """Methods, separated by commas, with variants after colons, such as dim:kl,
    dim:feature_gauss:task or dim:looksam."""
    seeds: int = 1
    """Number of trainings of each method, with the seeds 0, 1, …"""
    out: Path | None = None
    """Folder of the results; default runs/ and the task's name."""

    def run(self, task: Task) -> None:
        """Compares, and prints the table."""
        methods = {text.strip(): parse_method(text) for text in self.methods.split(",")}
        require(
            len(methods) == len(self.methods.split(",")),
            f"--methods is {self.methods!r}, where a method is there twice; name each once",
        )
        require(self.seeds >= 1, f"--seeds is {self.seeds}; choose at least 1")
        sites, labelled = self.check(task)
        out = self.out or Path("runs") / task.name
        runs = [(text, seed) for seed in range(self.seeds) for text in methods]
        if not self.overwrite:
            for text, seed in runs:
                check_earlier(
                    run_folder(out, text, labelled, seed), task, methods[text],
                    self.settings(labelled, seed), self.size, self.width,
                )  # fmt: skip
        data = self.open(task, sites, labelled)
        device = open_device(self.device, self.threads)
        check_writable(out)
        if self.overwrite:
            for text, seed in runs:
                remove_training(run_folder(out, text, labelled, seed))
        for text, seed in runs:
            self._train(task, data, methods[text], text, labelled, seed, out, device)
        with interruptible(GOES_ON, lambda: True):
            self._write(task, data, list(methods), labelled, out, device)

    def _train(
        self,
        task: Task,
        data: Data,
        method: Method,
        text: str,
        labelled: str,
        seed: int,
        out: Path,
        device: torch.device,
    ) -> None:
        settings = self.settings(labelled, seed)
        training = Run(task, data, method, settings, self.size, self.width, device)
        train_method(training, run_folder(out, text, labelled, seed), text)

    def _write(
        self,
        task: Task,
        data: Data,
        methods: Sequence[str],
        labelled: str,
        out: Path,
        device: torch.device,
    ) -> None:
        """Tests the best weights of all trainings and writes what came of it."""
        results: dict[str, list[Result]] = {"results": [], "student": []}
        histories: dict[str, list[list[Entry]]] = {text: [] for text in methods}
        teachers: dict[str, UNet] = {}
        for text in methods:
            for seed in range(self.seeds):
                folder = run_folder(out, text, labelled, seed)
                trained = load_trained(folder / "best.pt", task, device)
                histories[text].append(load(folder / LAST)["history"])
                teachers.setdefault(text, trained.teacher)
                for site, samples in data.test.items():
                    labels = {"method": text, "site": site, "seed": seed}
                    for name, model in (
                        ("results", trained.teacher),
                        ("student", trained.student),
                    ):
                        found = score_site(task, model, samples, device, labels)
                        results[name].append(found)
        table = markdown_table(task, results["results"], self.size, students=results["student"])
        if remove_results(out, RESULT_FILES):
            print(REPLACED.format(out), file=sys.stderr)
        scores = list(results["results"][0].cases[0].scores)
        for name, found_results in results.items():
            write_json(found_results, out / f"{name}.json", scores, "image")
        (out / "table.md").write_text(table)
        save_curves(out / "curves.png", histories, list(data.validation), labelled, self.every)
        save_predictions(out / "predictions.png", task, teachers, data.test, device)
        panels = with_and_without(teachers)
        if panels:
            save_features(out / "tsne.png", panels, data.test, device)
        print(table)


def with_and_without(models: Mapping[str, UNet]) -> dict[str, UNet]:
    """The first method that has the divergence, after the one that it adds it to; else nothing."""
    for text in sorted(models, key=lambda text: text.split(":")[0] != "dim"):
        without = WITHOUT_DIVERGENCE.get(text.split(":")[0])
        if without in models:
            return {without: models[without], text: models[text]}
    return {}
