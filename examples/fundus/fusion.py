"""What the fusions of disc and cup need: fixed weights, and what a source model's file tells.

Of the methods of adaptation, "fused" has these weights, and "gated" those of `CupGate` for each
image.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from examples.common.checkpoint import CheckpointError, load
from examples.common.datasets import Sample
from examples.common.usage import require
from examples.fundus.gate import CupRatio, measure_cup_ratio

FIXED = ((0.0, 0.6), (1.0, 0.4))
"""Weights of both candidates for disc and cup, the same for every image; see `CupGate`."""


def describe(ratio: CupRatio) -> dict[str, Any]:
    """What a source model's file tells of it, as `load_cup_ratio` reads it."""
    return {"cup_ratio": asdict(ratio)}


def load_cup_ratio(path: Path) -> CupRatio | None:
    """The ratio in a source model's file; None for files that do not tell it.

    Raises:
        CheckpointError: the file is missing or unreadable, or the ratio is not two numbers.
    """
    content = load(path).get("cup_ratio")
    if content is None:
        return None
    names = {"mean", "deviation"}
    if (
        not isinstance(content, dict)
        or content.keys() != names
        or not all(type(value) is float and 0 <= value < float("inf") for value in content.values())
    ):
        raise CheckpointError(
            f"{path}: its ratio of cup to disc is {content!r}, not two numbers; train it again"
        )
    return CupRatio(**content)


def require_cup_ratio(path: Path | None, samples: Dataset[Sample] | None) -> CupRatio:
    """The ratio in a source model's file, else that of the source's training images.

    Args:
        path: of the source model; None where it is still to be trained.
        samples: the source's training images; None where they are not at hand.

    Raises:
        UsageError: neither tells it, or the ratio is the same in all labels.
        CheckpointError: the file cannot be read.
    """
    ratio = None if path is None else load_cup_ratio(path)
    if ratio is None:
        require(
            samples is not None,
            f"{path} does not tell the ratio of cup to disc in its source's labels, which gated "
            "needs; give the source's images in --data-root, or train it again",
        )
        assert samples is not None
        ratio = measure_cup_ratio(samples)
    require(
        ratio.deviation > 0,
        f"gated measures distances from the source's ratio of cup to disc, which is "
        f"{ratio.mean:.3g} in all of its labels; train with more images, or leave gated out",
    )
    return ratio
