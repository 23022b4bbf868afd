"""The command that measures the fusion for every pair of centres."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.composition.candidates import Predictor
from benchmarks.composition.shifted import Shifted
from benchmarks.composition.student import Student, score_students
from benchmarks.composition.table import report
from benchmarks.composition.variants import cues_of, score_all
from benchmarks.machine import describe_machine
from benchmarks.made_by import command_line
from benchmarks.source_models import SourceModels
from examples.common.datasets import Sample, length
from examples.common.progress import Progress
from examples.common.usage import UsageError, check_writable, open_device, require, split_names
from examples.fundus.data import open_domain
from examples.fundus.fusion import require_cup_ratio
from examples.fundus.gate import CupRatio
from examples.fundus.network import ResUNet34
from examples.fundus.source_model import load_source_model
from examples.fundus.validation import open_source

PARTS = ("pairs", "shifted", "distilled")
DRAWS = 2
"""Variants of each image of the source in the part "shifted"."""


@dataclass(frozen=True)
class Source:
    """A source model and what its file tells.

    Attributes:
        name: its centre.
        model: the network.
        ratio: of cup to disc in its training labels.
        digest: of its file, so that results of different models are not mixed.
    """

    name: str
    model: ResUNet34
    ratio: CupRatio
    digest: str


@dataclass(frozen=True)
class Composition(SourceModels):
    """Fuse predictions under several statistics, for every source model and every other centre.

    Writes OUT/PART/SOURCE/TARGET.json for each pair, with Dice and cues of each image, and
    OUT/composition.json and OUT/composition.md from all that are there. A pair that is there with
    the same settings and model is not run again, so that the command may be interrupted, or run for
    some pairs only.
    """

    targets: str = ""
    """Centres to adapt to, separated by commas; default all others."""
    parts: str = "pairs,shifted"
    """What to run, separated by commas: pairs (all variants that do not learn), shifted (each
    source's test list in made-up colours, to learn gates from), distilled (those that learn, for
    whose table pairs are needed, too)."""
    out: Path = Path("runs/benchmark-composition")
    """Folder of the results."""
    overwrite: bool = False
    """Run again what is there."""

    def run(self) -> None:
        """Runs what is not there yet, and prints the tables."""
        domains, sources = self.centres()
        targets = split_names("--targets", self.targets or ",".join(domains), domains)
        parts = split_names("--parts", self.parts, PARTS)
        require(
            parts == ["shifted"] or any([source] != targets for source in sources),
            f"--targets is {targets[0]}, the source itself; choose from the other centres",
        )
        device = open_device(self.device, self.threads)
        check_writable(self.out)
        for source in (self._source(name, device) for name in sources):
            for part in parts:
                others = [each for each in targets if each != source.name]
                for target in [source.name] if part == "shifted" else others:
                    self._keep(part, source, target, device)
        records = self._records(PARTS, domains)
        text = f"Made by `{command_line('composition', self, ('device',))}`.\n\n{report(records)}"
        compact = json.dumps(records, separators=(",", ":"))
        (self.out / "composition.json").write_text(compact + "\n")
        (self.out / "composition.md").write_text(text)
        print(text)

    def _source(self, name: str, device: torch.device) -> Source:
        path = self.file_of(name)
        model, _ = load_source_model(path, self.width, self.size, name)
        images = open_source(self.data_root, name, self.size, self.seed, None)[0]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return Source(name, model.to(device), require_cup_ratio(path, images), digest)

    def _keep(self, part: str, source: Source, target: str, device: torch.device) -> None:
        """Runs a part for a pair and writes what came of it, unless it is there."""
        path = self.out / part / source.name / f"{target}.json"
        made_with = {**self.settings(), "model": source.digest}
        if path.exists() and not self.overwrite:
            found = json.loads(path.read_text())["made_with"]
            if found == made_with:
                return
            other = [name for name, value in made_with.items() if found.get(name) != value]
            then, now = (
                ", ".join(f"{name} {each.get(name)}" for name in other)
                for each in (found, made_with)
            )
            raise UsageError(
                f"{path} was made with {then}, not {now}; choose another --out, or run it again "
                "with --overwrite"
            )
        record = {
            "part": part,
            "source": source.name,
            "target": target,
            "made_with": made_with,
            "machine": describe_machine(),
            "cup_ratio": asdict(source.ratio),
            "images": self._measure(part, source, target, device),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n")

    def _measure(
        self, part: str, source: Source, target: str, device: torch.device
    ) -> list[dict[str, Any]]:
        if part == "shifted":
            _, unseen = open_source(self.data_root, target, self.size, self.seed, None, self.images)
            require(unseen is not None, f"{target} has no test list to learn gates from")
            assert unseen is not None
            dataset: Dataset[Sample] = Shifted(unseen, DRAWS, self.seed)
        else:
            dataset = open_domain(self.data_root, target, "all", self.size, self.seed, self.images)
        samples = [dataset[index] for index in range(length(dataset))]
        if part == "distilled":
            predict = Student(source.model, source.ratio, self.seed)
        else:
            predict = Predictor(source.model)
        found: list[Any] = []
        with Progress(len(samples), f"{source.name} → {target}, {part}", "image") as progress:
            for sample in samples:
                found.append(predict(sample.image.to(device)))
                progress.update()
        if part == "distilled":
            return score_students(found, samples)
        if part == "shifted":
            return [
                cues_of(each, sample.target, source.ratio)
                for each, sample in zip(found, samples, strict=True)
            ]
        return score_all(found, samples, source.ratio, self.seed)

    def _records(self, parts: Iterable[str], domains: Sequence[str]) -> list[dict[str, Any]]:
        """All results of these parts that are there, sorted by part, source and target."""
        paths = (
            self.out / part / source / f"{target}.json"
            for part in parts
            for source in domains
            for target in domains
        )
        return [json.loads(path.read_text()) for path in paths if path.exists()]
