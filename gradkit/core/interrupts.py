"""Delaying interrupts while a step changes state."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# CPython's functions behind those of `signal`, which look each handler up among its enumerations.
_signal: Any = sys.modules.get("_signal", signal)


class Interrupts:
    """Delays Ctrl-C (SIGINT) until a step can be abandoned.

    Between `begin` and `end` signals are delayed, except inside `allowed`, where the user's
    closures run. A delayed signal acts on the next entry to `allowed`, or at `end`. Python delivers
    signals to the main thread only; in other threads this does nothing.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._held: list[tuple[int, FrameType | None]] = []
        self._open = False

    def begin(self) -> None:
        """Start to delay signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(signal.SIGINT)
        if callable(handler):
            self._handler = handler
            _signal.signal(signal.SIGINT, self._receive)

    def end(self) -> None:
        """Stop delaying signals, and let a delayed one act."""
        if self._handler is not None:
            _signal.signal(signal.SIGINT, self._handler)
            self._act()

    def allowed(self) -> Interrupts:
        """A block in which a signal acts at once."""
        return self

    def __enter__(self) -> None:
        self._open = True
        try:
            self._act()
        except BaseException:
            self._open = False
            raise

    def __exit__(self, *error: object) -> None:
        self._open = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._held.append((number, frame))
        if self._open:
            self._open = False
            self._act()

    def _act(self) -> None:
        if self._held and self._handler is not None:
            number, frame = self._held.pop()
            self._held.clear()
            self._handler(number, frame)
