"""The inputs of a rule and what it returns, and checks of preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.host import uploaded

Preference = Sequence[float] | Mapping[str, float] | Tensor
"""One number for each objective, in their order (a 1-d tensor, too) or by their names."""

Remembered = Mapping[str, Tensor]
"""A rule's memory of the objectives that take part: tensors [*batch], [*batch, K] or
[*batch, K, K] by name."""

Weighed = tuple[Float[Tensor, "*batch K"], Remembered]
"""Weights, and the new memory."""


@dataclass(frozen=True, eq=False)
class RuleInputs:
    """The inputs of a rule in one evaluation.

    Attributes:
        gram: The Gram matrix [*batch, K, K] of the weighted rows wᵢgᵢ, in float64; zeros for rules
            that do not need it.
        names: The objectives' names; the row numbers for a bare matrix.
        losses: The objectives' losses [K], weighted as the rule requires; None if they are not
            known.
        first_losses: Each objective's loss in its first evaluation of the step, at the step's own
            weights; there it is the same as `losses`.
        draws: The random numbers that the rule's `draw` returned for this step.
        every: The names of all objectives of the step, including those that take no part.
    """

    gram: Float[Tensor, "*batch K K"]
    names: tuple[str, ...] = ()
    losses: Float[Tensor, " K"] | None = None
    first_losses: Float[Tensor, " K"] | None = None
    draws: Any = None
    every: tuple[str, ...] = ()

    def index(self, objective: str | int) -> int:
        """The row index of an objective, given by name or position.

        Raises:
            ValueError: If there is no such objective.
        """
        if isinstance(objective, str) and objective in self.names:
            return self.names.index(objective)
        if isinstance(objective, int) and -len(self.names) <= objective < len(self.names):
            return objective % len(self.names)
        raise ValueError(
            f"there is no objective {objective!r}; there are {', '.join(map(repr, self.names))}. A "
            "main objective (main=) takes part in every step"
        )

    def numbers(self, preference: int | float | Preference, like: Tensor) -> Float[Tensor, " K"]:
        """A preference, or a number for all, as one number for each row; see `numbers_of`.

        Raises:
            ValueError: If it does not have one number for each row.
        """
        return numbers_of(preference, self.names, like, self.every)

    def shares(self, preference: Preference | None, like: Tensor) -> Float[Tensor, " K"]:
        """A preference as one number for each row; 1/K each if there is no preference.

        Raises:
            ValueError: If it does not have one number for each row.
        """
        if preference is None:
            count = like.shape[-1]
            return like.new_full((count,), 1 / count)
        return self.numbers(preference, like)

    def needed_losses(self, who: object) -> Float[Tensor, " K"]:
        """The losses, for a rule that needs them.

        Raises:
            ValueError: If they are not known.
        """
        return needed(self.losses, who)


def numbers_of(
    preference: int | float | Preference,
    names: Sequence[str],
    like: Tensor,
    every: Sequence[str] = (),
) -> Float[Tensor, " K"]:
    """A preference as one number for each of these objectives.

    Args:
        preference: Numbers in order or by name, for these objectives or for all of the step; or one
            number for all.
        names: The objectives.
        like: A tensor with the dtype and device of the result.
        every: All objectives of the step.

    Raises:
        ValueError: If it does not have one number for each objective.
    """
    if isinstance(preference, (int, float)):
        return like.new_full((len(names),), preference)
    if isinstance(preference, Tensor):
        preference = preference.tolist()
    if not isinstance(preference, Mapping):
        order = names if len(preference) == len(names) else every
        if len(preference) != len(order):
            raise ValueError(
                f"there are {len(preference)} numbers ({', '.join(map(str, preference))}) for "
                f"{len(names)} objectives ({', '.join(names)}); pass one for each, or a "
                "mapping from names where some may be absent"
            )
        preference = dict(zip(order, preference, strict=True))
    missing = [name for name in names if name not in preference]
    if missing:
        raise ValueError(
            f"there is no number for the objective {missing[0]!r}; there are numbers for "
            f"{', '.join(map(repr, preference))}"
        )
    chosen = [float(preference[name]) for name in names]
    return uploaded(torch.tensor(chosen, dtype=like.dtype, device="cpu"), like)


def needed(losses: Float[Tensor, " K"] | None, who: object) -> Float[Tensor, " K"]:
    """Losses, for a rule that needs them.

    Raises:
        ValueError: If they are None.
    """
    if losses is None:
        raise ValueError(
            f"{who!r} works on losses, too; pass losses=, one for each objective, beside the "
            "gradients (in gk.wrap() a rule of your own gets them if its needs_losses is True)"
        )
    return losses


def check_numbers(
    name: str,
    numbers: int | float | Preference,
    *,
    least: int | float | None = None,
    most: int | float | None = None,
) -> None:
    """Check an argument with one number for all objectives, or one for each.

    Args:
        name: The argument's name, for the message.
        numbers: The argument.
        least: The smallest number that is allowed.
        most: The largest number that is allowed.

    Raises:
        TypeError: If it is not a number, nor a sequence or mapping of numbers.
        ValueError: If a number is not finite or outside the range.
    """
    if numbers is None or isinstance(numbers, (int, float)):
        check_number(name, numbers, least=least, most=most)
    else:
        check_preference(name, numbers, least=least, most=most)


def check_preference(
    name: str,
    preference: Preference | None,
    *,
    least: int | float | None = None,
    most: int | float | None = None,
) -> None:
    """Check an argument with one number for each objective.

    Args:
        name: The argument's name, for the message.
        preference: The argument; None is accepted.
        least: The smallest number that is allowed.
        most: The largest number that is allowed.

    Raises:
        TypeError: If it is not a sequence or mapping of numbers.
        ValueError: If a number is not finite or outside the range.
    """
    if preference is None:
        return
    if isinstance(preference, Tensor) and preference.dim() == 1:
        preference = preference.tolist()
    if isinstance(preference, (str, Tensor)) or not isinstance(preference, (Sequence, Mapping)):
        raise TypeError(
            f"{name} is {preference!r}; pass a list with one number for each objective, or a "
            "mapping from their names"
        )
    for number in preference.values() if isinstance(preference, Mapping) else preference:
        check_number(f"a number in {name}", number, least=least, most=most)


def too_low(
    who: object, losses: Mapping[str, float], least: Mapping[str, float] | float, what: str
) -> str | None:
    """The error text for the first loss that is not above its bound; None if all are.

    Args:
        who: The transform.
        losses: The objectives' losses.
        least: The bound, or the bound of each objective.
        what: The requirement, in words.
    """
    for name, loss in losses.items():
        if not loss > (least if isinstance(least, (int, float)) else least[name]):
            return f"{who!r} takes {what}, and that of objective {name!r} is {loss:g}"
    return None
