"""Markdown tables, and numbers with their intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""A title, and what it shows of a row."""


def table(head: Sequence[str], numeric: int, lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose last `numeric` columns are aligned right; empty without lines.

    Example:
        >>> print(table(("rule", "ms"), 1, [("Sum", "2")]))
        | rule | ms |
        |---|--:|
        | Sum | 2 |
    """
    rule = ["---"] * (len(head) - numeric) + ["--:"] * numeric
    listed = ["| " + " | ".join(line) + " |" for line in lines]
    if not listed:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|", *listed])


def table_of(rows: Iterable[Row], columns: Sequence[Column], label: str, title: str) -> str:
    """A Markdown table with a line for each row: its label, and what each column shows of it.

    Args:
        rows: at least the columns' values and the label.
        columns: all numeric.
        label: the label's name in a row.
        title: of the labels' column.

    Example:
        >>> print(table_of([{"name": "SAM", "n": 2}], [("passes", lambda row: str(row["n"]))],
        ...     "name", "method"))
        | method | passes |
        |---|--:|
        | SAM | 2 |
    """
    lines = [[row[label], *(show(row) for _, show in columns)] for row in rows]
    return table([title, *(name for name, _ in columns)], len(columns), lines)


def plus_minus(mean: float, half: float, sign: str = "") -> str:
    """A mean and half of its interval.

    Example:
        >>> plus_minus(1.25, 0.5, "+")
        '+1.25 ± 0.50'
    """
    return f"{mean:{sign}.2f} ± {half:.2f}"


def interval(row: Row, digits: int = 2) -> str:
    """A value with its interval.

    Example:
        >>> interval({"value": 1.25, "low": 1.0, "high": 1.5})
        '1.25 [1.00, 1.50]'
    """
    return with_ends(row["value"], (row["low"], row["high"]), digits)


def with_ends(value: float, ends: Sequence[float] | None, digits: int = 2, sign: str = "") -> str:
    """A value with the ends of its interval; with a dash where there is none.

    Example:
        >>> with_ends(1.25, (1.0, 1.5), 1, "+"), with_ends(1.25, None)
        ('+1.2 [+1.0, +1.5]', '1.25 [-]')
    """
    form = f"{sign}.{digits}f"
    inside = "-" if ends is None else ", ".join(f"{end:{form}}" for end in ends)
    return f"{value:{form}} [{inside}]"


def section(title: str, *parts: str) -> list[str]:
    """A heading with what follows it; nothing where the last part is empty."""
    return [f"## {title}", *filter(None, parts)] if parts[-1] else []
