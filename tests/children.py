"""Running programs that may hang, without hanging the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).parent.parent
VARIABLES = {"PYTHONFAULTHANDLER": "1", "PYTHONIOENCODING": "utf-8"}
LAST_WORDS = 5.0
"""Seconds that an aborted process has for printing its stacks."""


class HungError(AssertionError):
    """A program was still running at its time limit; the message holds what it printed."""


def run_python(
    *arguments: object, limit: float = 120, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`; nothing that it has started outlives this call's time limit.

    Args:
        arguments: Of the interpreter.
        limit: Seconds. A process that is still there afterwards prints the stacks of its threads,
            and is killed with all processes below it.
        cwd: The program's current directory.
        environment: Further variables.

    Raises:
        HungError: The program did not end.
    """
    command = [sys.executable, *map(str, arguments)]
    # Into files: a pipe stays open as long as any process below holds it.
    with _text_file() as out, _text_file() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env={**os.environ, **VARIABLES, **environment},
            start_new_session=True,
        )
        hung = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            hung = True
            _abort(process)
        finally:
            _kill(process)
        texts = [_text(file) for file in (out, err)]
    if hung:
        said = "\n".join(texts)
        raise HungError(f"still running after {limit} s: python {' '.join(command[1:])}\n{said}")
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all below it, those in sessions of their own too (torchrun's workers)."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def _though_gone() -> Iterator[None]:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        yield


def _abort(process: subprocess.Popen[bytes]) -> None:
    """Let the family print its stacks, parents before their children end: by faulthandler."""
    family = _family(process)
    for each in family:
        with _though_gone():
            if hasattr(each, "rlimit"):
                each.rlimit(psutil.RLIMIT_CORE, (0, 0))  # no core file of some gigabytes
            each.send_signal(signal.SIGABRT)
    _, alive = psutil.wait_procs(family, LAST_WORDS)
    for each in alive:
        with _though_gone():
            each.kill()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left, of an ended program's process group too."""
    for each in _family(process):
        with _though_gone():
            each.kill()
    with _though_gone():
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
