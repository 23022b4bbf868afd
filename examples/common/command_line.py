"""A typed command line whose complaints are one line each."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")
BAD_INPUT = 2  # the exit status of a command that was called wrongly, as argparse has it
_BOX = "╭╮╰╯│─|+- "


def parse(kind: Any, arguments: Sequence[str] | None, prog: str, description: str) -> Any:
    """Parses a command line by tyro, with its framed complaints shortened to one line.

    Args:
        kind: the type to build from the command line, a dataclass or a union of them.
        arguments: the words after the program's name; None takes the process's.
        prog: how the program is called.
        description: what it is for, shown by `--help`.

    Returns:
        An instance of `kind`.

    Raises:
        SystemExit: with status 0 after `--help`, with status 2 after one line on standard error.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, prog=prog, description=description)
    except SystemExit as stop:
        if stop.code:
            print(f"error: {shorten(complaint.getvalue())} (see {prog} --help)", file=sys.stderr)
        raise


def shorten(framed: str) -> str:
    r"""The first paragraph under the title of a framed text, in one line.

    Example:
        >>> shorten("╭─ Bad ─╮\n│ no -x │\n│ ───── │\n│ hints │\n╰───────╯")
        'no -x'
    """
    _, *lines = framed.strip().splitlines() or [""]
    texts: list[str] = []
    for line in lines:
        text = line.strip("│| ")
        if text.strip(_BOX):
            texts.append(text)
        elif texts:
            break
    return " ".join(" ".join(texts or framed.split()).split())


def run(command: Callable[[], None], *bad_input: type[Exception]) -> int:
    """Runs a command; an error of the given types becomes one line on standard error.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    try:
        command()
    except bad_input as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    return 0
