"""Progress on standard error: a bar on a terminal, lines everywhere else."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

INTERVAL = 10.0
"""Seconds between lines, unless others are asked for."""


class Progress:
    """How far a loop has come, as a context round the loop.

    On a terminal it is a tqdm bar. Elsewhere (a file, a pipe, continuous integration), where a
    bar's carriage returns would leave one endless line, it writes whole lines: by default one every
    ten seconds, and one at the end.

    Args:
        total: Number of rounds.
        description: What the line begins with; None shows nothing.
        unit: What a round is, in the singular.
        initial: Rounds that were done before.
        every_round: Write a line for each round, whatever its time; for rounds that are long.
        interval: Seconds between lines.
        clock: Seconds from some moment on.

    Example:
        >>> with Progress(2, None, "epoch") as progress:
        ...     progress.update("loss 0.5")
    """

    def __init__(
        self,
        total: int,
        description: str | None,
        unit: str,
        initial: int = 0,
        every_round: bool = False,
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done = self._initial = initial
        self._interval = 0.0 if every_round else interval
        self._clock = clock
        self._began = self._written = clock()
        self._bar = (
            tqdm(total=total, desc=description, unit=unit, initial=initial)
            if description is not None and sys.stderr.isatty()
            else None
        )

    def update(self, note: str = "") -> None:
        """Counts a round.

        Args:
            note: What came of it, shown behind the count.
        """
        self._done += 1
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self._description is not None:
            self._write_line(note)

    def _write_line(self, note: str) -> None:
        now = self._clock()
        last = self._done == self._total
        if now - self._written < self._interval and not last:
            return
        self._written = now
        seconds = now - self._began
        words = [f"{self._description}: {self._unit} {self._done} of {self._total}"]
        words += [note] if note else []
        words.append(f"{_duration(seconds)} so far")
        if not last:
            rate = seconds / (self._done - self._initial)
            words.append(f"about {_duration(rate * (self._total - self._done))} left")
        print(", ".join(words), file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the bar's line, also after an error, before anything else is printed."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    Example:
        >>> _duration(75), _duration(3600)
        ('1:15', '1:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
