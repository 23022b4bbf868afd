"""The command that compares methods of test-time adaptation, the example's main one."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from examples.common.adaptation import Stream, adapt_online
from examples.common.command_line import interruptible
from examples.common.contours import spread
from examples.common.datasets import Sample, length
from examples.common.results import remove_results, write_json
from examples.common.usage import check_writable, open_device, require, split_names
from examples.fundus.commands import REPLACED, RESUME, Train, note_statistics
from examples.fundus.data import available_domains, check, open_domain
from examples.fundus.earlier import refuse_to_replace_model
from examples.fundus.figures import save_alignment, save_predictions
from examples.fundus.fusion import describe, load_cup_ratio, require_cup_ratio
from examples.fundus.gate import CupRatio
from examples.fundus.heads import describe_heads, load_heads_statistics
from examples.fundus.methods import BY_DEFAULT, METHODS, build_adapter
from examples.fundus.network import ResUNet34
from examples.fundus.results import (
    RESULT_FILES,
    SCORES,
    make_result,
    markdown_table,
)
from examples.fundus.sample import DICE
from examples.fundus.source_model import load_source_model, save_source_model
from examples.fundus.training import evaluate
from examples.fundus.validation import (
    check_adaptation,
    check_counts,
    check_heads,
    check_training,
    open_source,
)

SIZE, WIDTH = 128, 16
"""Of images and network where neither an option nor a checkpoint tells."""


@dataclass(frozen=True)
class Compare:
    """Train or load a source model, adapt it to target centres by several methods, and compare.

    Writes OUT/results.json, OUT/table.md, OUT/figure.png, OUT/alignment.png (where GraTa is
    among the methods) and the source model OUT/SOURCE.pt. Results of an earlier run are replaced;
    a training or another model of the source is not, unless by --overwrite.
    """

    data_root: str = "synthetic"
    """Folder of the lists and images, or "synthetic" for generated photographs."""
    source: str = "centre_a"
    """Centre of the source model."""
    targets: str = "centre_b,centre_d,centre_e"
    """Centres to adapt to, separated by commas."""
    methods: str = ",".join(BY_DEFAULT)
    """Methods, separated by commas: none, ptbn, tent, grata, and with their published settings dua,
    diga, medbn, dltta, domainadaptor, sar, sar-scaled, eata, cotta, memo, deyo, vptta, intent,
    intent-balanced, rotta, pass, and pass-shapes, which adds its shape prompts and aligns the
    decoder, too, from which they learn; with a checkpoint that has auxiliary heads (see the
    command heads), detta and detta-released, which sees all of a target before it predicts. And two
    fusions of predictions under several statistics: fused, with weights fixed for disc and cup, and
    gated, with a weight for each image."""
    statistics: str = "test"
    """Where tent and grata take batch normalisation's statistics: source, test, mixed:SHARE."""
    lr: float = 1e-4
    """Learning rate of tent and grata."""
    checkpoint: Path | None = None
    """Source model to use instead of training one."""
    size: int | None = None
    """Side of the square images, pixels; a multiple of 32, at least 64; default: as --checkpoint
    tells, else 128."""
    width: int | None = None
    """Channels of the network's first stage; 64 is the published network; default: as --checkpoint
    tells, else 16."""
    epochs: int | None = None
    """Passes over the training images; default 20, with --resume as many as the training has. More
    extend it: further epochs take the learning rates of the longer schedule."""
    train_images: int | None = None
    """Images of the source's train list to use; default all (synthetic: 100)."""
    target_images: int | None = None
    """Images of each target, and of the source's test list, to use, from the start; default all
    (synthetic: 100 and 50)."""
    seed: int = 0
    """Seed of synthetic data, training, augmentation and bootstrap."""
    device: str = "auto"
    """Where to compute: auto (GPU if there is one), cpu, cuda, cuda:1, …"""
    threads: int = 1
    """Threads of a CPU; more pay off for large images on an idle machine."""
    out: Path = Path("runs/fundus")
    """Folder of the results; made if missing."""
    resume: bool = False
    """Continue the training that is in OUT/training, or use it if it is finished."""
    overwrite: bool = False
    """Train anew where OUT holds a training or model already, or replace the model by that of
    --checkpoint."""

    def run(self) -> None:
        """Compares, and prints the table."""
        domains = available_domains(self.data_root)
        split_names("--source", self.source, domains, single=True)
        others = [domain for domain in domains if domain != self.source]
        targets = split_names("--targets", self.targets, others, source=self.source)
        methods = split_names("--methods", self.methods, list(METHODS))
        check_training(self.size, self.width, self.epochs)
        loaded = None
        size, width = self.size or SIZE, self.width or WIDTH
        if self.checkpoint is not None:
            loaded = load_source_model(self.checkpoint, self.width, self.size, self.source)
            size, width = loaded[1].size, loaded[1].width
        training = Train(
            self.data_root,
            self.source,
            size,
            width,
            self.epochs,
            train_images=self.train_images,
            seed=self.seed,
            device=self.device,
            threads=self.threads,
            out=self.out,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        check_adaptation(self.statistics, self.lr)
        check_counts(self.seed, self.threads, self.train_images, self.target_images)
        check(self.data_root, [self.source, *targets])
        trained_on, unseen = open_source(
            self.data_root,
            self.source,
            size,
            self.seed,
            self.train_images,
            self.target_images,
        )
        ratio = None
        if any(METHODS[method].ratio for method in methods):
            ratio = require_cup_ratio(self.checkpoint, trained_on)
        device = open_device(self.device, self.threads)
        kept = self.out / f"{self.source}.pt"
        if loaded is None:
            check_heads(methods, trained=False)
            epochs = training.check_earlier()
            check_writable(self.out)
            model = training.fit(epochs)
        else:
            require(
                not self.resume,
                "--resume continues a training, and --checkpoint takes the place of one; leave "
                "one of them out",
            )
            model, architecture = loaded
            check_heads(methods, architecture.auxiliary_heads)
            if not self.overwrite:
                refuse_to_replace_model(kept, model)
            check_writable(self.out)
            note_statistics(methods, self.checkpoint)
            known = load_cup_ratio(self.checkpoint) or ratio
            facts = {} if known is None else describe(known)
            heads = load_heads_statistics(self.checkpoint)
            facts |= {} if heads is None else describe_heads(heads)
            save_source_model(kept, architecture, model.state_dict(), **facts)
        # What was trained is kept: --resume goes on with the adaptation.
        with interruptible(RESUME, lambda: self.checkpoint is None):
            self._adapt(model.to(device), size, unseen, targets, methods, ratio, device)

    def _adapt(
        self,
        model: ResUNet34,
        size: int,
        unseen: Dataset[Sample] | None,
        targets: Sequence[str],
        methods: Sequence[str],
        ratio: CupRatio | None,
        device: torch.device,
    ) -> None:
        """Adapts the source model to each target by each method and writes what came of it."""
        in_domain = None
        if unseen is not None:
            in_domain = (self.source, length(unseen), evaluate(model, unseen, device))
        data = {
            target: open_domain(self.data_root, target, "all", size, self.seed, self.target_images)
            for target in targets
        }
        shown = {
            target: spread(2 if len(targets) < 4 else 1, length(samples))
            for target, samples in data.items()
        }
        results = []
        streams: dict[tuple[str, str], Stream] = {}
        for target, samples in data.items():
            for method in methods:
                adapter = build_adapter(method, model, self.statistics, self.lr, self.seed, ratio)
                stream = adapt_online(
                    adapter,
                    samples,
                    device,
                    DICE,
                    shown[target],
                    f"{target}, {method}",
                    target_first=METHODS[method].target_first,
                )
                streams[target, method] = stream
                results.append(
                    make_result(
                        self.source, target, method, self.statistics, self.lr, self.seed, stream
                    )
                )
        table = markdown_table(results, self.seed, in_domain)
        if remove_results(self.out, RESULT_FILES):
            print(REPLACED.format(self.out), file=sys.stderr)
        write_json(results, self.out / "results.json", SCORES, "image")
        (self.out / "table.md").write_text(table)
        _save_figures(self.out, streams, methods, data, shown)
        print(table)


def _save_figures(
    out: Path,
    streams: dict[tuple[str, str], Stream],
    methods: Sequence[str],
    data: dict[str, Dataset[Sample]],
    shown: dict[str, list[int]],
) -> None:
    rows = []
    for target, indices in shown.items():
        for index in indices:
            predictions = {
                method: (
                    streams[target, method].predictions[index],
                    streams[target, method].scores[index],
                )
                for method in methods
            }
            rows.append((target, data[target][index], predictions))
    save_predictions(out / "figure.png", rows)
    aligned = {target: stream for (target, _), stream in streams.items() if stream.cosines}
    if aligned:
        save_alignment(out / "alignment.png", aligned)
