"""TensorBoard, where it is installed."""

from pathlib import Path
from types import TracebackType
from typing import Any

from examples.common.training import Entry
from examples.common.usage import UsageError


class Board:
    """Writes what each epoch came to as scalars, in a context.

    Args:
        directory: Where the event files go.

    Raises:
        UsageError: The package `tensorboard` is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs the package tensorboard; install it, or leave the option out"
            ) from error
        self._writer: Any = SummaryWriter(str(directory))  # type: ignore[no-untyped-call]

    def write(self, entry: Entry) -> None:
        """Writes an epoch's losses and scores by their names."""
        for name, value in entry.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(entry["epoch"]))
        self._writer.flush()

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files, also after an error."""
        self._writer.close()
