"""The command line of a semi-supervised example."""

from collections.abc import Sequence

from examples.common.checkpoint import CheckpointError
from examples.common.command_line import parse, run
from examples.common.pictures import DataError
from examples.common.training import TrainingError
from examples.common.usage import UsageError
from examples.semi.commands import Evaluate, Export, Train
from examples.semi.comparison import Compare
from examples.semi.task import Task

COMMANDS = {"compare": Compare, "train": Train, "evaluate": Evaluate, "export": Export}


def run_command(task: Task, arguments: Sequence[str] | None, description: str) -> int:
    """Runs one command.

    Args:
        task: what is segmented.
        arguments: the words after the program's name; None takes the process's.
        description: what the program is for, shown by `--help`.

    Returns:
        The exit status: 0, 2 for bad input, or 130 after Ctrl-C, either of which is explained in
        one line on standard error.
    """
    command = parse(COMMANDS, arguments, prog=task.prog, description=description)
    return run(lambda: command.run(task), UsageError, DataError, CheckpointError, TrainingError)
