"""A typed command line whose complaints are one line each."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from examples.common.suggestions import did_you_mean

T = TypeVar("T")
BAD_INPUT = 2  # the exit status of a command that was called wrongly, as argparse has it
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BOX = "╭╮╰╯│─|+- "


def parse(
    commands: Mapping[str, type],
    arguments: Sequence[str] | None,
    prog: str,
    description: str,
) -> Any:
    """Parses a command line by tyro, with its framed complaints shortened to one line.

    Args:
        commands: the commands' names, and dataclasses of their options.
        arguments: the words after the program's name; None takes the process's.
        prog: how the program is called.
        description: what it is for, shown by `--help`.

    Returns:
        An instance of the dataclass of the command that was called.

    Raises:
        SystemExit: with status 0 after `--help`, with status 2 after one line on standard error.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands), args=words, prog=prog, description=description
            )
    except SystemExit as stop:
        if stop.code:
            complaint = mistake(commands, words) or shorten(framed.getvalue())
            command = f" {words[0]}" if words and words[0] in commands else ""
            print(f"error: {complaint} (see {prog}{command} --help)", file=sys.stderr)
        raise


def mistake(commands: Mapping[str, type], words: Sequence[str]) -> str | None:
    """What is wrong with the first word of a command line that cannot be, and what was meant.

    Args:
        commands: as for `parse`.
        words: after the program's name.

    Returns:
        One line, or None if nothing is found.

    Example:
        >>> @dataclasses.dataclass
        ... class Train:
        ...     epochs: int = 20
        >>> mistake({"train": Train}, ["trian"])
        "there is no command 'trian'; choose from train; did you mean train?"
        >>> mistake({"train": Train}, ["train", "--epoch=3"])
        'train has no option --epoch; did you mean --epochs?'
        >>> mistake({"train": Train}, ["train", "--epochs", "many"])
        "--epochs is 'many'; give a whole number"
    """
    names = ", ".join(commands)
    if not words or words[0].startswith("-"):
        return f"a command is missing before the options; choose from {names}"
    command, *rest = words
    if command not in commands:
        guess = did_you_mean(command, commands)
        return f"there is no command {command!r}; choose from {names}{guess}"
    options = _options(commands[command])
    given = set()
    remaining = iter(rest)
    for word in remaining:
        name, joined, value = word.partition("=")
        option = name.replace("_", "-")
        if not name.startswith("-"):
            return f"{command} takes no {word!r} here; values follow their option's name"
        if option not in options:
            return f"{command} has no option {name}{_instead(option, command, commands)}"
        given.add(option)
        if options[option] is bool:
            if joined:
                return f"{name} takes no value; leave {joined}{value} out"
            continue
        value = value if joined else next(remaining, "")
        if not value or value.partition("=")[0].replace("_", "-") in options:
            return f"{name} needs a value"
        complaint = _objection(value, options[option])
        if complaint:
            return f"{name} is {value!r}; {complaint}"
    missing = [option for option in _required(commands[command]) if option not in given]
    return f"{command} needs {' and '.join(missing)}" if missing else None


def _options(kind: type) -> dict[str, Any]:
    """The options of a command and their types; bool for those that take no value."""
    types = get_type_hints(kind)
    options: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        option = _option(field.name)
        options[option] = types[field.name]
        if types[field.name] is bool:
            options[option.replace("--", "--no-", 1)] = bool
    return options


def _required(kind: type) -> list[str]:
    missing = dataclasses.MISSING
    return [
        _option(field.name)
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    ]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _objection(value: str, kind: Any) -> str | None:
    """What is wrong with an option's value: it is no number, or none of a few choices."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        wrong = value not in choices
        return f"choose from {', '.join(choices)}{did_you_mean(value, choices)}" if wrong else None
    kinds = set(get_args(kind)) or {kind}
    if type(None) in kinds and value == "None":
        return None
    for number, name in ((int, "a whole number"), (float, "a number")):
        if number in kinds:
            try:
                number(value)
            except ValueError:
                return f"give {name}"
    return None


def _instead(option: str, command: str, commands: Mapping[str, type]) -> str:
    """What an unknown option may have meant, and which other commands have it."""
    others = [name for name, kind in commands.items() if option in _options(kind)]
    *most, last = others or [""]
    of_others = f"; it is for {' and '.join(filter(None, (', '.join(most), last)))}" if last else ""
    return of_others + did_you_mean(option, _options(commands[command]))


def shorten(framed: str) -> str:
    r"""The first paragraph under the title of a framed text, in one line.

    Example:
        >>> shorten("╭─ Bad ─╮\n│ no -x │\n│ ───── │\n│ hints │\n╰───────╯")
        'no -x'
    """
    _, *lines = framed.strip().splitlines() or [""]
    texts: list[str] = []
    for line in lines:
        text = line.strip("│| ")
        if text.strip(_BOX):
            texts.append(text)
        elif texts:
            break
    return " ".join(" ".join(texts or framed.split()).split())


def run(command: Callable[[], None], *bad_input: type[Exception]) -> int:
    """Runs a command; Ctrl-C or an error of the given types becomes one line on standard error.

    A `KeyboardInterrupt` may carry a remedy, as `interruptible` adds one, which then ends the line.

    Returns:
        The exit status: 0, 2 for bad input, or 130 after Ctrl-C.
    """
    try:
        command()
    except bad_input as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def interruptible(remedy: str, applies: Callable[[], bool]) -> Iterator[None]:
    r"""Adds to an interruption by Ctrl-C what to do next.

    Args:
        remedy: what the user can do.
        applies: asked when the interruption comes, whether the remedy is of use by then.

    Example:
        >>> def command():
        ...     with interruptible("continue with --resume", lambda: True):
        ...         raise KeyboardInterrupt
        >>> with contextlib.redirect_stderr(io.StringIO()) as lines:
        ...     status = run(command)
        >>> status, lines.getvalue()
        (130, 'interrupted; continue with --resume\n')
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args or not applies():
            raise
        raise KeyboardInterrupt(remedy) from None
