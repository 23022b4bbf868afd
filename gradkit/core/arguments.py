"""Checks of arguments."""

from __future__ import annotations

from numbers import Real

import torch


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
