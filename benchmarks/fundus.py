"""Test-time adaptation strategies on fundus photographs, every centre against every other.

The strategies are fixed beforehand, not chosen by their results: the published settings, the
statistics alone, a milder mixture of statistics at a higher learning rate, and a control that
GraTa's paper lacks, its mean learning rate held constant.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.source_models import SourceModels
from benchmarks.tables import with_ends
from examples.common.adaptation import adapt_online
from examples.common.datasets import length
from examples.common.scores import mean_scores
from examples.common.usage import (
    UsageError,
    check_writable,
    open_device,
    refuse_to_replace,
    require,
)
from examples.fundus.data import open_domain
from examples.fundus.methods import build_adapter
from examples.fundus.sample import DICE
from examples.fundus.source_model import load_source_model
from gradkit import tta

MIXED = "mixed:0.8"


@dataclass(frozen=True)
class Strategy:
    """One row of the table."""

    name: str
    method: str
    statistics: str = "test"
    lr: float = 1e-4


STRATEGIES = (
    Strategy("No Adapt", "none"),
    Strategy("PTBN", "ptbn"),
    Strategy("TENT", "tent"),
    Strategy("GraTa", "grata"),
    Strategy("GraTa, its mean learning rate held constant", "constant"),
    Strategy("mixed statistics alone", "mixed", MIXED),
    Strategy("TENT, mixed statistics", "tent", MIXED, 1e-3),
    Strategy("GraTa, mixed statistics", "grata", MIXED, 1e-3),
)


@dataclass(frozen=True)
class Fundus(SourceModels):
    """Adapt every source model to every other centre by several strategies.

    Writes OUT/SOURCE.json for each source, and OUT/fundus.md from all of these that are there, so
    that sources may be run one by one, with the same settings. Source models come from
    `examples.fundus`.
    """

    out: Path = Path("runs/benchmark-fundus")
    """Folder of the results."""
    overwrite: bool = False
    """Replace the results of an earlier run of the same sources in --out."""

    def run(self) -> None:
        """Runs the benchmark, and prints the table."""
        domains, sources = self.centres()
        models = {source: self._model(source) for source in sources}
        device = open_device(self.device, self.threads)
        self._check_earlier(sources, domains)
        check_writable(self.out)
        for source, model in models.items():
            model.to(device)
            rows = []
            for target in (domain for domain in domains if domain != source):
                rows += self._adapt(model, source, target, device)
            record = {"machine": describe_machine(), **self.settings(), "results": rows}
            (self.out / f"{source}.json").write_text(json.dumps(record, indent=1) + "\n")
        table = make_table(self._files(domains))
        (self.out / "fundus.md").write_text(table)
        print(table)

    def _files(self, sources: Iterable[str]) -> list[Path]:
        """The results of these sources that are there, sorted by name."""
        files = (self.out / f"{source}.json" for source in sorted(sources))
        return [file for file in files if file.exists()]

    def _check_earlier(self, sources: Sequence[str], domains: Sequence[str]) -> None:
        if not self.overwrite:
            files = self._files(sources)
            left = [name for name in sources if self.out / f"{name}.json" not in files]
            if files and left:
                raise UsageError(
                    f"{files[0]} is there from an earlier run; go on with the others by --sources "
                    f"{','.join(left)}, choose another --out, or replace it with --overwrite"
                )
            refuse_to_replace(files)
        for file in self._files(set(domains) - set(sources)):
            record = json.loads(file.read_text())
            for name, value in self.settings().items():
                require(
                    record.get(name, value) == value,
                    f"{file} was made with {name} {record.get(name)}, not {value}; choose another "
                    f"--out, so that no table mixes them",
                )

    def _model(self, source: str) -> nn.Module:
        return load_source_model(self.file_of(source), self.width, self.size, source)[0]

    def _adapt(
        self, model: nn.Module, source: str, target: str, device: torch.device
    ) -> list[dict[str, object]]:
        samples = open_domain(self.data_root, target, "all", self.size, self.seed, self.images)
        rows: list[dict[str, object]] = []
        scores: dict[str, Tensor] = {}
        mean_scale = 1.0
        for strategy in STRATEGIES:
            adapter = self._adapter(strategy, model, mean_scale)
            stream = adapt_online(
                adapter, samples, device, DICE, description=f"{source} → {target}, {strategy.name}"
            )
            if strategy.name == "GraTa":
                mean_scale = sum(stream.lr_scales) / len(stream.lr_scales)
            means = [score.mean for score in stream.scores]
            scores[strategy.name] = torch.tensor(means, dtype=torch.float64)
            difference = (scores[strategy.name] - scores["No Adapt"]).tolist()
            rows.append(
                {
                    "source": source,
                    "target": target,
                    "strategy": strategy.name,
                    "statistics": strategy.statistics,
                    "lr": strategy.lr,
                    "n": length(samples),
                    **mean_scores(stream.scores),
                    "mean": sum(means) / len(means),
                    "interval": pooled_interval([means], self.seed),
                    "difference": sum(difference) / len(difference),
                    "difference_interval": pooled_interval([difference], self.seed),
                    "differences": [round(value, 4) for value in difference],
                    "cosine": _mean(stream.cosines),
                    "lr_scale": _mean(stream.lr_scales),
                }
            )
        return rows

    def _adapter(self, strategy: Strategy, model: nn.Module, mean_scale: float) -> tta.Adapter:
        if strategy.method == "mixed":
            return tta.PTBN(model, statistics=tta.Mixed(0.8))
        if strategy.method == "constant":
            return tta.GraTa(
                model,
                lr=strategy.lr * mean_scale,
                activation="constant",
                generator=torch.Generator().manual_seed(self.seed),
            )
        return build_adapter(strategy.method, model, strategy.statistics, strategy.lr, self.seed)


def make_table(files: Iterable[Path]) -> str:
    """The averages over all pairs, then each pair, as Markdown."""
    records = [json.loads(file.read_text()) for file in files]
    rows = [row for record in records for row in record["results"]]
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    pairs = list(dict.fromkeys((row["source"], row["target"]) for row in rows))
    by_key = {(row["source"], row["target"], row["strategy"]): row for row in rows}
    lines = [
        f"Dice in %, mean of disc and cup, over {len(pairs)} pairs of centres.",
        "",
        "| strategy | statistics | lr | mean | minus No Adapt [95% interval] | per pair | cosine |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        group = [by_key[(*pair, name)] for pair in pairs]
        differences = [row["difference"] for row in group]
        ends = pooled_interval([row["differences"] for row in group], records[0]["seed"])
        cosines = [row["cosine"] for row in group if row["cosine"] is not None]
        learns = name.startswith(("TENT", "GraTa"))
        lr = f"{group[0]['lr']:g}" if learns else "-"
        statistics = "source" if name == "No Adapt" else group[0]["statistics"]
        lines.append(
            f"| {name} | {statistics} | {lr} | {_average(row['mean'] for row in group):.2f} "
            f"| {with_ends(_average(differences), ends, sign='+')} "
            f"| {min(differences):+.2f} to {max(differences):+.2f} "
            f"| {f'{_average(cosines):+.2f}' if cosines else '-'} |"
        )
    lines += [
        "",
        f"| source → target | n | {' | '.join(names)} |",
        "|---|--:|" + "--:|" * len(names),
    ]
    for pair in pairs:
        cells = []
        for name in names:
            row = by_key[(*pair, name)]
            cells.append(with_ends(row["mean"], row["interval"], 1))
        count = by_key[(*pair, names[0])]["n"]
        lines.append(f"| {pair[0]} → {pair[1]} | {count} | {' | '.join(cells)} |")
    machine = ", ".join(f"{key} {value}" for key, value in records[0]["machine"].items())
    lines += [
        "",
        "Intervals are percentile bootstraps over images, within pairs; those of differences are "
        "paired. They hold for these source models and this order of images, and do not cover how "
        "results vary between trainings.",
        "",
        f"Machine: {machine}.",
    ]
    return "\n".join(lines) + "\n"


def pooled_interval(
    groups: Sequence[Sequence[float]], seed: int, resamples: int = 2000
) -> tuple[float, float] | None:
    """The 95% bootstrap interval of the mean of group means, resampling within each group.

    None if a group has one value only, which says nothing of how its values vary.
    """
    if any(len(group) < 2 for group in groups):
        return None
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(resamples, dtype=torch.float64)
    for group in groups:
        values = torch.tensor(group, dtype=torch.float64)
        drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
        total += values[drawn].mean(dim=1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (total / len(groups)).quantile(ends).tolist()
    return low, high


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _average(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
