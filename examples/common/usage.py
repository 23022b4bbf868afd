"""Options that cannot be carried out: one line, with what to write instead."""

from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """An option is wrong; the message is one line with the valid choices."""


def require(holds: bool, message: str) -> None:
    """Raises a UsageError with the message unless the condition holds."""
    if not holds:
        raise UsageError(message)


def refuse_to_replace(files: Iterable[Path]) -> None:
    """Makes sure that none of the files exists.

    Raises:
        UsageError: one does.
    """
    for file in files:
        require(
            not file.exists(),
            f"{file} is there from an earlier run; choose another --out, or replace it with "
            f"--overwrite",
        )
