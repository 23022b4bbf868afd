"""One job: a source model adapts to one target by one variant. Its scores are written at once.

A job's file is complete or absent, so that an interrupted run goes on with the jobs whose files
are missing.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset, Subset

from benchmarks.tta.cost import Passes, PeakTensors, milliseconds_of
from benchmarks.tta.setting import Setting, checksum, load_model, write_atomically
from benchmarks.tta.variants import Variant
from examples.common.adaptation import adapt_first
from examples.common.datasets import Sample, length
from examples.common.metrics import segment
from examples.common.usage import UsageError
from examples.fundus.gate import CupRatio, measure_cup_ratio
from examples.fundus.sample import DICE
from gradkit import tta
from gradkit.tta.objectives import mean_prediction

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A source model, a target and a variant.

    Attributes:
        setting: data, network and folders.
        seed: of the source model, and of the variant's random numbers.
        source: centre of the source model.
        target: centre to adapt to.
        variant: how.
    """

    setting: Setting
    seed: int
    source: str
    target: str
    variant: Variant

    @property
    def file(self) -> Path:
        """Where the job's results are kept."""
        return _file(self.setting, self.seed, self.source, self.target, self.variant.name)

    @property
    def model(self) -> str:
        """The checksum of the source model's file."""
        return checksum(self.model_file)

    @property
    def model_file(self) -> Path:
        """The source model's file: with heads, if the variant needs them."""
        return self.setting.model_file(self.seed, self.source, self.variant.heads)

    def result(self) -> Record | None:
        """What the job has left; None if it is still to be done.

        Raises:
            UsageError: the file is damaged, or was made with another source model.
        """
        if not self.file.exists():
            return None
        try:
            record: Record = json.loads(self.file.read_text())
            model = record["model"]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{self.file} cannot be read; remove it to run the job anew"
            ) from error
        if model != self.model:
            raise UsageError(
                f"{self.file} was made with another source model of {self.source}; choose another "
                f"--out, so that no table mixes them"
            )
        return record


def _file(setting: Setting, seed: int, source: str, target: str, name: str) -> Path:
    return setting.out / "jobs" / f"seed{seed}" / source / target / f"{name}.json"


@lru_cache(maxsize=8)
def _target(setting: Setting, centre: str) -> Dataset[Sample]:
    return setting.target(centre)


def run(job: Job) -> None:
    """Adapts, and writes the job's file.

    Raises:
        RuntimeError: the variant whose learning rate this one takes is not done.
    """
    setting, variant = job.setting, job.variant
    model = load_model(job.model_file, setting.width, setting.size, job.source, setting.device)
    if not variant.heads:  # no head takes part in what the others do or draw
        model = model.without_heads()
    ratio = _ratio(setting, job.source) if variant.ratio else None
    adapter = variant.adapter(model, job.seed, _scale(job), ratio)
    images, cost = adapt(
        adapter, _target(setting, job.target), torch.device(setting.device), variant
    )
    record = {
        "source": job.source,
        "target": job.target,
        "variant": variant.name,
        "seed": job.seed,
        "model": job.model,
        **cost,
        "images": images,
    }
    write_atomically(job.file, json.dumps(record, separators=(",", ":")) + "\n")


@lru_cache(maxsize=8)
def _ratio(setting: Setting, source: str) -> CupRatio:
    """Of cup to disc in the labels that the source model is trained on."""
    return measure_cup_ratio(setting.source(source))


def _scale(job: Job) -> float:
    name = job.variant.scale_of
    if name is None:
        return 1.0
    file = _file(job.setting, job.seed, job.source, job.target, name)
    if not file.exists():
        raise RuntimeError(f"{job.variant.name} needs the results of {name}, which failed")
    return mean(image["lr_scale"] for image in json.loads(file.read_text())["images"])


def attempt(job: Job) -> str | None:
    """Runs a job; returns what went wrong in one line, or None."""
    try:
        run(job)
    except Exception as error:  # whatever a method does, the other jobs go on
        what = " ".join(str(error).split())
        return f"{job.source} → {job.target}, {job.variant.title}: {type(error).__name__}: {what}"
    return None


def adapt(
    adapter: tta.Adapter, samples: Dataset[Sample], device: torch.device, variant: Variant
) -> tuple[list[Record], Record]:
    """Adapts to one image after another, in order.

    Targets are used for the scores alone, and for the cosine with their gradient if the variant
    asks for it; neither has an influence on the adaptation.

    Returns:
        Of each image its scores (Dice in %), of GraTa's relatives the cosine of pseudo and
        auxiliary gradient and the factor of the learning rate; and what an image costs: means of
        images forwards and backwards, the time in ms, the peak of tensors in MB. Of a variant that
        sees the target first, passes and time include that, and the peak is of a whole batch.
    """
    rows: list[Record] = []
    times: list[float] = []
    count = length(samples)
    memory = PeakTensors()
    predict: Callable[[Tensor], Tensor] = adapter
    earlier = 0.0  # milliseconds of adapting before the first prediction
    size = variant.target_first
    if size is not None:
        beginning = Subset(samples, range(min(size, count)))
        with memory:
            adapt_first(copy.deepcopy(adapter), beginning, device, size)
    with Passes() as passes:
        if size is not None:
            predict, earlier = milliseconds_of(
                lambda: adapt_first(adapter, samples, device, size), device
            )
        forwards, backwards = passes.forwards, passes.backwards
        for index in range(count):
            sample = samples[index]
            image, target = (part.unsqueeze(0).to(device) for part in (sample.image, sample.target))
            row: Record = {"image": sample.name}
            logits: dict[str, Tensor] = {}
            if "before" in variant.predictions:
                with torch.no_grad():
                    logits["before"] = adapter.model(image)
            empirical = _empirical(adapter, image, target) if variant.empirical else None
            before = passes.forwards, passes.backwards
            if index == min(1, count - 1):  # the first image's step makes the optimizer's state
                with memory:
                    logits["after"] = predict(image)
            else:
                logits["after"], time = milliseconds_of(lambda image=image: predict(image), device)
                times.append(time)
            forwards += passes.forwards - before[0]
            backwards += passes.backwards - before[1]
            if "views" in variant.predictions:
                logits["views"] = torch.logit(mean_prediction(adapter.model, image), eps=1e-6)
            row["scores"] = {
                name: {
                    structure: round(value, 3)
                    for structure, value in DICE(
                        segment(logits[name][0].float().cpu()), sample.target
                    ).items()
                }
                for name in variant.predictions
            }
            row |= _of_step(adapter)
            if empirical is not None:
                row["empirical"] = _round(F.cosine_similarity(empirical, _applied(adapter), dim=0))
            rows.append(row)
    return rows, {
        "forwards": forwards / count,
        "backwards": backwards / count,
        # The first images warm up; where there are no others, they have to do.
        "milliseconds": sorted(times)[len(times) // 2] + earlier / count if times else None,
        "megabytes": memory.peak / 1e6,
    }


def _of_step(adapter: tta.Adapter) -> Record:
    step = adapter.last_step
    if step is None or not {"pseudo", "auxiliary"} <= set(step.names):
        return {}
    return {
        "cosine": _round(step.cosine("pseudo", "auxiliary")),
        "lr_scale": float(step.lr_scale),
    }


def _round(value: Tensor) -> float:
    return round(float(value), 4)


def _empirical(adapter: tta.Adapter, image: Tensor, target: Tensor) -> Float[Tensor, " P"]:
    """The gradient of the cross-entropy with the labels, at the weights before the step."""
    loss = F.binary_cross_entropy_with_logits(adapter.model(image), target)
    return _flat(torch.autograd.grad(loss, list(adapter.trained().values())))


def _applied(adapter: tta.Adapter) -> Float[Tensor, " P"]:
    """The gradient that the last step gave to the base optimizer."""
    parameters = adapter.trained().values()
    return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def _flat(parts: Sequence[Tensor]) -> Float[Tensor, " P"]:
    return torch.cat([part.flatten() for part in parts]).double()


def rounds(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs in the order of their needs: those that take another's learning rate come second."""
    needy = [job for job in jobs if job.variant.scale_of is not None]
    return [[job for job in jobs if job not in needy], needy]


def scores_of(record: Mapping[str, Any], prediction: str) -> list[float]:
    """The Dice of each image, mean of disc and cup, %."""
    return [mean(image["scores"][prediction].values()) for image in record["images"]]
