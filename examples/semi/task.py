"""What tells one task of semi-supervised segmentation from another: its structures and its data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.contours import Outline
from examples.common.datasets import Sample

Split: TypeAlias = Literal["train", "test"]
SYNTHETIC = "synthetic"
"""The root that stands for the generated sites."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: in file names and messages.
        prog: how its program is called.
        structures: names of the channels of a target.
        channels: of an image: 1 grey, 3 colours.
        size: side of the network's images, pixels, that is published.
        strong: range of the factors of brightness and contrast of strong augmentation.
        levels: grey levels of a mask, for messages.
        folder: what lies between split and `image` or `mask` in the layout; "" for nothing.
        decode: a mask's grey levels to a target; raises a ValueError that says what is wrong.
        encode: a target to a mask's grey levels.
        case: of an image's file name without ending, the examination that it belongs to.
        outlines: of the structures in figures.
        sites: names of the synthetic sites; the first is the labelled one where none is named.
        generate: a synthetic site's images: by site, split, length, size and seed.
    """

    name: str
    prog: str
    structures: tuple[str, ...]
    channels: int
    size: int
    strong: tuple[float, float]
    levels: str
    folder: str
    decode: Callable[[UInt8[Tensor, "h w"]], Float[Tensor, "structures h w"]]
    encode: Callable[[Float[Tensor, "structures h w"]], UInt8[Tensor, "h w"]]
    case: Callable[[str], str]
    outlines: Sequence[Outline]
    sites: tuple[str, ...]
    generate: Callable[[str, Split, int, int, int], Dataset[Sample]]
