"""Checks of arguments given by users."""

from __future__ import annotations

from numbers import Real


def check_number(name: str, value: object, *, finite: bool = True) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: If it is none.
        ValueError: If it is NaN, or infinite though it may not be.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; pass a number")
    if value != value or (finite and value in (float("inf"), float("-inf"))):
        raise ValueError(f"{name} is {value}; it must be a finite number")
