"""Command line of the fundus example.

`python -m examples.fundus train|heads|adapt|compare|export`
"""

import sys
from collections.abc import Sequence

from examples.common.checkpoint import CheckpointError
from examples.common.command_line import parse, run
from examples.common.training import TrainingError
from examples.common.usage import UsageError
from examples.fundus.commands import Adapt, Export, Heads, Train
from examples.fundus.comparison import Compare
from examples.fundus.data import DataError

COMMANDS = {
    "compare": Compare,
    "train": Train,
    "heads": Heads,
    "adapt": Adapt,
    "export": Export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words after the program's name; None takes the process's.

    Returns:
        The exit status: 0, 2 for bad input, or 130 after Ctrl-C, either of which is explained in
        one line on standard error.
    """
    command = parse(
        COMMANDS,
        arguments,
        prog="python -m examples.fundus",
        description="Segment optic disc and cup at one centre, then adapt to others at test time.",
    )
    return run(command.run, UsageError, DataError, CheckpointError, TrainingError)


if __name__ == "__main__":
    sys.exit(main())
