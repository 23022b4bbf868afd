"""Command line of the benchmarks: `python -m benchmarks fundus`."""

import sys
from collections.abc import Sequence

from benchmarks.alignment import Alignment
from benchmarks.composition import Composition
from benchmarks.dim import DiM
from benchmarks.fundus import Fundus
from benchmarks.gsema import GSEMA
from benchmarks.sharpness import Sharpness
from benchmarks.speed import Speed
from benchmarks.tta import TTA
from examples.common.checkpoint import CheckpointError
from examples.common.command_line import parse, run
from examples.common.training import TrainingError
from examples.common.usage import UsageError
from examples.fundus.data import DataError

COMMANDS = {
    "fundus": Fundus,
    "speed": Speed,
    "alignment": Alignment,
    "gsema": GSEMA,
    "dim": DiM,
    "sharpness": Sharpness,
    "composition": Composition,
    "tta": TTA,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark.

    Returns:
        The exit status: 0, or 2 for bad input, which is explained in one line on standard error.
    """
    command = parse(
        COMMANDS,
        arguments,
        prog="python -m benchmarks",
        description="Compare strategies and measure what they cost.",
    )
    return run(command.run, UsageError, DataError, CheckpointError, TrainingError)


if __name__ == "__main__":
    sys.exit(main())
