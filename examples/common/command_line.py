"""A typed command line whose complaints are one line each."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")
BAD_INPUT = 2  # the exit status of a command that was called wrongly, as argparse has it
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
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
    """Runs a command; Ctrl-C or an error of the given types becomes one line on standard error.

    A `KeyboardInterrupt` may carry a remedy, as `interruptible` adds one, which then ends the line.

    Returns:
        The exit status: 0, 2 for bad input, or 130 after Ctrl-C.
    """
    try:
        command()
    except bad_input as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def interruptible(remedy: str, applies: Callable[[], bool]) -> Iterator[None]:
    r"""Adds to an interruption by Ctrl-C what to do next.

    Args:
        remedy: what the user can do.
        applies: asked when the interruption comes, whether the remedy is of use by then.

    Example:
        >>> def command():
        ...     with interruptible("continue with --resume", lambda: True):
        ...         raise KeyboardInterrupt
        >>> with contextlib.redirect_stderr(io.StringIO()) as lines:
        ...     status = run(command)
        >>> status, lines.getvalue()
        (130, 'interrupted; continue with --resume\n')
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args or not applies():
            raise
        raise KeyboardInterrupt(remedy) from None
