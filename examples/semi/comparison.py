"""The command that compares methods of semi-supervised training, the examples' main one."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.common.checkpoint import load
from examples.common.command_line import interruptible
from examples.common.results import Result, remove_results, write_json
from examples.common.training import LAST, Entry
from examples.common.usage import require
from examples.semi.commands import GOES_ON, REPLACED, Experiment, Trainings, run_folder
from examples.semi.figures import save_curves, save_features, save_predictions
from examples.semi.methods import METHODS, parse_methods
from examples.semi.network import UNet
from examples.semi.results import RESULT_FILES, markdown_table, score_sites
from examples.semi.task import Task
from examples.semi.training import load_trained

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
        methods = parse_methods(self.methods)
        require(self.seeds >= 1, f"--seeds is {self.seeds}; choose at least 1")
        out = self.out or Path("runs") / task.name
        trainings = self.train_all(task, methods, self.seeds, out)
        with interruptible(GOES_ON, lambda: True):
            self._write(task, list(methods), trainings, out)

    def _write(
        self,
        task: Task,
        methods: Sequence[str],
        trainings: Trainings,
        out: Path,
    ) -> None:
        """Tests the best weights of all trainings and writes what came of it."""
        data, labelled, device = trainings
        results: dict[str, list[Result]] = {"results": [], "student": []}
        histories: dict[str, list[list[Entry]]] = {text: [] for text in methods}
        teachers: dict[str, UNet] = {}
        for text in methods:
            for seed in range(self.seeds):
                folder = run_folder(out, text, labelled, seed)
                trained = load_trained(folder / "best.pt", task, device)
                histories[text].append(load(folder / LAST)["history"])
                teachers.setdefault(text, trained.teacher)
                for name, model in (("results", trained.teacher), ("student", trained.student)):
                    results[name] += score_sites(task, model, data.test, device, text, seed)
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
