"""Source models on disk: a network's weights together with what they were trained for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.checkpoint import CheckpointError, load, save_atomically
from examples.fundus.network import ResUNet34

FORMAT = "gradkit fundus 1"


@dataclass(frozen=True)
class Architecture:
    """What must agree between a checkpoint and the experiment that uses it.

    Attributes:
        width: channels of the network's first stage; 64 is the published network.
        size: side of the images it was trained on, pixels; None where the file does not tell.
        source: the centre it was trained on; None where the file does not tell.
        auxiliary_heads: whether the network has the heads of GraTa's Table 5.
    """

    width: int
    size: int | None
    source: str | None
    auxiliary_heads: bool = False

    def build(self) -> ResUNet34:
        """A network of this architecture with random weights."""
        return ResUNet34(self.width, self.auxiliary_heads)


_ENTRIES: dict[str, tuple[type, ...]] = {
    "width": (int,),
    "size": (int, type(None)),
    "source": (str, type(None)),
    "auxiliary_heads": (bool,),
}
"""Types of the entries of an architecture in a file, where anything may be written."""


def save_source_model(
    path: Path, architecture: Architecture, weights: dict[str, Tensor], **details: Any
) -> None:
    """Writes weights, architecture and further plain values (scores, settings) atomically."""
    save_atomically({**describe(architecture), "model": weights, **details}, path)


def describe(architecture: Architecture) -> dict[str, Any]:
    """What a checkpoint tells of its network, as `read_architecture` reads it."""
    return {"format": FORMAT, "architecture": asdict(architecture)}


def read_architecture(path: Path, content: dict[str, Any]) -> Architecture:
    """The architecture that a loaded checkpoint declares, or shows by its tensors.

    A bare state dict, as the authors of GraTa release theirs, tells width and heads by the shapes
    and names of its tensors, and neither source nor size.

    Raises:
        CheckpointError: the content is not that of a ResUNet-34, or it declares an architecture
            that this program does not know.
    """
    if content.get("format") == FORMAT:
        return _declared_architecture(path, content.get("architecture"))
    stem = content.get("res.conv1.weight")
    if "format" in content or not isinstance(stem, Tensor) or stem.ndim != 4:
        raise CheckpointError(
            f"{path}: not a checkpoint of this program; make one with "
            f"`python -m examples.fundus train`"
        )
    return Architecture(stem.shape[0], None, None, "recon_head.weight" in content)


def _declared_architecture(path: Path, entries: Any) -> Architecture:
    remedy = "it was changed or is of another version; train it again or pass another checkpoint"
    if not isinstance(entries, dict) or entries.keys() != _ENTRIES.keys():
        names = sorted(map(str, entries)) if isinstance(entries, dict) else entries
        raise CheckpointError(
            f"{path}: its architecture has the entries {names}, not {sorted(_ENTRIES)}; {remedy}"
        )
    for name, types in _ENTRIES.items():
        if type(entries[name]) not in types:  # exactly: a bool is no width
            raise CheckpointError(
                f"{path}: its architecture has {name} {entries[name]!r}, a "
                f"{type(entries[name]).__name__}; {remedy}"
            )
    return Architecture(**entries)


def load_source_model(
    path: Path,
    width: int | None = None,
    size: int | None = None,
    source: str | None = None,
) -> tuple[ResUNet34, Architecture]:
    """Reads a network, which must be of the expected architecture.

    Args:
        path: written by `save_source_model`, or a bare state dict with the released names.
        width: expected width; None takes the file's, as for the next two.
        size: expected side of the images, pixels.
        source: expected source centre.

    Returns:
        The network on the CPU in evaluation mode, and the file's architecture with unknown
        entries replaced by the expected ones.

    Raises:
        CheckpointError: the file is missing, unreadable, or of another architecture.
    """
    content = load(path)
    found = read_architecture(path, content)
    for name, expected in (("width", width), ("size", size), ("source", source)):
        actual = getattr(found, name)
        if None not in (actual, expected) and actual != expected:
            raise CheckpointError(
                f"{path}: trained with {name} {actual}, not {expected}; pass --{name} {actual} "
                f"or another checkpoint"
            )
    weights = content.get("model") if "format" in content else content
    model = _build(path, found)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # other tensors, or none
        raise CheckpointError(
            f"{path}: its tensors are not those of a ResUNet-34 of width {found.width}; "
            f"train it again or pass another checkpoint"
        ) from error
    known = Architecture(
        found.width, found.size or size, found.source or source, found.auxiliary_heads
    )
    return model.eval(), known


def _build(path: Path, architecture: Architecture) -> ResUNet34:
    try:
        # Weights are overwritten next; drawing them must not advance the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            return architecture.build()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}; pass another checkpoint") from error
