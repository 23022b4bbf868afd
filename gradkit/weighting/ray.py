"""Preferences as rays: directions from the ideal point into the space of losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from gradkit.surgery.inputs import Preference, check_preference


def check_ray(preference: Preference | None) -> None:
    """Check a preference that is the direction of a ray.

    Raises:
        TypeError: If it is not a sequence or mapping of numbers.
        ValueError: If a number is negative or not finite, or if none is positive.
    """
    check_preference("preference", preference, least=0)
    if preference is None:
        return
    if not any(float(number) > 0 for number in _numbers(preference)):
        raise ValueError(
            f"preference is {preference!r}, which is no direction; make a number in it positive"
        )


def no_ray(who: object, preference: Preference | None, losses: Mapping[str, float]) -> str | None:
    """The error text for a step whose objectives all have the preference 0; None for others."""
    if isinstance(preference, Mapping) and not any(preference.get(name, 1) for name in losses):
        names = ", ".join(map(repr, losses))
        return f"{who!r} needs an objective of positive preference, and the step has only {names}"
    return None


def divided(vector: Float[Tensor, " K"], norm: Float[Tensor, ""]) -> Float[Tensor, " K"]:
    """A vector divided by a norm; 0 where the norm is 0."""
    return vector / norm.where(norm != 0, float("inf"))


def _numbers(preference: Preference) -> Iterable[float]:
    if isinstance(preference, Tensor):
        numbers: list[float] = preference.tolist()
        return numbers
    return preference.values() if isinstance(preference, Mapping) else preference
