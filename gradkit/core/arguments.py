"""Checks of arguments."""

from __future__ import annotations

from numbers import Real


def check_number(name: str, value: object, *, finite: bool = True) -> None:
    """Check that an argument is a number.

    Args:
        name: The argument's name, for the message.
        value: The argument.
        finite: Whether infinities are refused, too; NaN always is.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If it is NaN, or infinite where `finite` is set.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; pass a number")
    if value != value or (finite and value in (float("inf"), float("-inf"))):
        raise ValueError(f"{name} is {value}; it must be a finite number")
