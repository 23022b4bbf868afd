"""Whose line a warning is about."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_INSIDE = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent)
)


def caller_level() -> int:
    """The `stacklevel` with which a warning names the line that called gradkit.

    Torch's own frames in between, such as those of schedulers and hooks, do not count.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
