"""The scores of a finished training on the centre that it left out, kept beside its network."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.aneurysm.inference import score_volumes
from examples.aneurysm.training import load_network
from examples.common.checkpoint import CheckpointError, load, save_atomically
from examples.common.datasets import Sample, length
from examples.common.scores import CaseScores

TESTED = "tested.pt"
SHOWN = 2
"""Volumes whose labels are kept, too: those that figures show."""


@dataclass(frozen=True)
class Tested:
    """What a network came to on the volumes of a centre.

    Attributes:
        cases: The scores of each volume.
        labels: What it predicts for the first `SHOWN` volumes, [D, H, W].
    """

    cases: list[CaseScores]
    labels: list[Tensor]


def score_network(best: Path, samples: Dataset[Sample], device: torch.device) -> Tested:
    """Segments and scores volumes by the network in a training's folder, unless that was done.

    What is found is kept in the folder, and read again where the network's file and the volumes are
    the same to the bit.

    Args:
        best: The network's file.
        samples: The volumes, with targets.
        device: Where to compute.

    Raises:
        CheckpointError: The network cannot be read.
    """
    path = best.with_name(TESTED)
    of = {"network": hashlib.sha256(best.read_bytes()).hexdigest(), "volumes": _digest(samples)}
    kept = _read(path)
    if kept.get("of") != of:
        network, architecture = load_network(best)
        cases, labels = score_volumes(
            network.to(device), samples, architecture.patch, device, architecture.mirror
        )
        shown = [label.to(torch.uint8) for label in labels[:SHOWN]]
        kept = {"of": of, "cases": [asdict(case) for case in cases], "labels": shown}
        save_atomically(kept, path)
    return Tested([CaseScores(**case) for case in kept["cases"]], kept["labels"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return load(path)
    except CheckpointError:  # what is missing or damaged is made again
        return {}


def _digest(samples: Dataset[Sample]) -> str:
    digest = hashlib.sha256()
    for index in range(length(samples)):
        sample = samples[index]
        digest.update(sample.name.encode() + b"\0")
        for tensor in (sample.image, sample.target):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
