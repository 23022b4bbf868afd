"""Command line of the prostate example.

`python -m examples.prostate train|evaluate|compare|export`
"""

import sys
from collections.abc import Sequence

from examples.prostate.task import TASK
from examples.semi.command_line import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; see `run_command`."""
    return run_command(TASK, arguments, "Segment the prostate at sites that have no labels.")


if __name__ == "__main__":
    sys.exit(main())
