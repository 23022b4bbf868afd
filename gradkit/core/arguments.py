"""Checks of arguments."""

from __future__ import annotations

from numbers import Real

import torch


def check_number(
    name: str,
    value: object,
    *,
    least: int | float | None = None,
    most: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    finite: bool = True,
) -> None:
    """Check that an argument is a number in a range.

    Args:
        name: The argument.
        value: What was given.
        least: The smallest number that is allowed.
        most: The largest number that is allowed.
        above: What it must be more than.
        below: What it must be less than.
        finite: Whether infinity is not allowed.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is NaN, outside the range, or infinite where that is not allowed.

    Examples:
        >>> check_number("beta", 1.0, least=0, below=1)
        Traceback (most recent call last):
        ValueError: beta is 1.0; it must be at least 0 and less than 1
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; pass a number")
    if value != value or (finite and value in (float("inf"), float("-inf"))):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    number = float(value)
    bounds = [
        (least, "at least", least is None or number >= least),
        (above, "more than", above is None or number > above),
        (most, "at most", most is None or number <= most),
        (below, "less than", below is None or number < below),
    ]
    if all(holds for *_, holds in bounds):
        return
    words = " and ".join(f"{words} {bound:g}" for bound, words, _ in bounds if bound is not None)
    if least is not None and most is not None:
        words = f"between {least:g} and {most:g}"
    raise ValueError(f"{name} is {value}; it must be {words.replace('more than 0', 'positive')}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Check that an argument is a whole number.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; pass a whole number")
    check_number(name, value, least=least)


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one with seed 0, the same in every process.

    Raises:
        TypeError: If it is not a generator.
        ValueError: If it is not on the CPU.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}; pass torch.Generator().manual_seed(...)")
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}; pass one on the CPU, whose numbers are the same "
            "in every process"
        )
    return generator
