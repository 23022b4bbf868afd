"""Command line of the aneurysm example: `python -m examples.aneurysm`."""

import sys
from collections.abc import Sequence

from examples.aneurysm.commands import Evaluate, Export, Train
from examples.aneurysm.comparison import Compare
from examples.aneurysm.data import DataError
from examples.common.checkpoint import CheckpointError
from examples.common.command_line import parse, run
from examples.common.nifti import NiftiError
from examples.common.training import TrainingError
from examples.common.usage import UsageError

COMMANDS = {"compare": Compare, "train": Train, "evaluate": Evaluate, "export": Export}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after the program's name; None takes the process's.

    Returns:
        The exit status: 0, 2 for bad input, or 130 after Ctrl-C, either of which is explained in
        one line on standard error.
    """
    command = parse(
        COMMANDS,
        arguments,
        prog="python -m examples.aneurysm",
        description="Segment aneurysms in rotational angiograms of a centre not trained on.",
    )
    return run(command.run, UsageError, DataError, NiftiError, CheckpointError, TrainingError)


if __name__ == "__main__":
    sys.exit(main())
