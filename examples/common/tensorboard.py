"""Curves for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class ScalarWriter:
    """A context that writes numbers by step to a new event file, for `tensorboard --logdir`.

    Files of earlier runs in the same folder stay; TensorBoard joins them.

    Args:
        directory: where the file goes; made if missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ScalarWriter(Path(folder)) as writer:
        ...         writer.add({"loss": 0.5}, step=1)
        ...     print(len(list(Path(folder).glob("events.out.tfevents.*"))))
        1
    """

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # slow, and not every run needs it

        self._writer = SummaryWriter(str(directory))  # type: ignore[no-untyped-call]

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers of one step, by their tags."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def __enter__(self) -> "ScalarWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]
