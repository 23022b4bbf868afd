"""Checkpoint files that are either complete or absent, and that run no code when read."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line with the file and the remedy."""


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a crash leaves the previous file or the new one, never a part.

    The content goes to a temporary file in the same directory, to disk, and then takes the
    place of the old file in one operation of the file system.

    Args:
        content: tensors and plain values, as `torch.load(..., weights_only=True)` reads them.
        path: in a directory that exists.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a checkpoint gets the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; only tensors and plain values, so that no code runs.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint or is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file surfaces as almost any exception, from zipfile's to the unpickler's.
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint of tensors and plain values "
            f"({type(error).__name__}); train it again or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary")
    return content
