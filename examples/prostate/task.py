"""The prostate as a task: whole-gland masks on T2-weighted slices of several sites."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.contours import Outline
from examples.common.datasets import Sample
from examples.prostate.synthetic import SITES, SyntheticProstate
from examples.semi.task import Split, Task

PROSTATE, BACKGROUND = 0, 255
"""Grey levels of a mask."""


def decode_target(mask: UInt8[Tensor, "h w"]) -> Float[Tensor, "1 h w"]:
    """A mask's grey levels to 1 in the prostate.

    Raises:
        ValueError: there is another level; the message goes on after the file's name.
    """
    inside = mask == PROSTATE
    others = mask[~inside & (mask != BACKGROUND)]
    if len(others) > 0:
        raise ValueError(
            f"holds the grey level {int(others[0])}; a mask has {PROSTATE} in the prostate and "
            f"{BACKGROUND} outside"
        )
    return inside[None].float()


def encode_target(target: Float[Tensor, "1 h w"]) -> UInt8[Tensor, "h w"]:
    """A target to a mask's grey levels."""
    mask = torch.full(target.shape[1:], BACKGROUND, dtype=torch.uint8)
    return mask.masked_fill(target[0] > 0.5, PROSTATE)


def _generate(site: str, split: Split, length: int, size: int, seed: int) -> Dataset[Sample]:
    return SyntheticProstate(site, split, length, size, seed)


TASK = Task(
    name="prostate",
    prog="python -m examples.prostate",
    structures=("prostate",),
    channels=1,
    size=384,
    strong=(0.1, 2.0),
    levels=f"{PROSTATE} in the prostate, {BACKGROUND} outside",
    folder="",
    decode=decode_target,
    encode=encode_target,
    case=lambda stem: stem.rpartition("_")[0] or stem,
    outlines=(Outline("prostate", "#F0E442"),),
    sites=tuple(SITES),
    generate=_generate,
)
