"""The check for NaNs and infinities, with one copy from the device to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradkit.core.gradients import Gradients, Measurement

Nonfinite = Literal["raise", "skip", "ignore"]
NONFINITE: tuple[Nonfinite, ...] = ("raise", "skip", "ignore")


class NonFiniteError(FloatingPointError, RuntimeError):
    """A loss or a gradient is NaN or infinite."""


@runtime_checkable
class Source(Protocol):
    """The part of a source of gradients that the check reads."""

    measured: list[Measurement]
    without_loss: set[str]
    first_losses: dict[str, Tensor]
    unmeasured: dict[str, Tensor]


class FiniteCheck(NamedTuple):
    """The result of the check, on the host.

    Attributes:
        problem: What is not finite, in words; None if everything is.
        scale: The factor of the learning rate; None for 1.
        weights: The objectives' weights; None if the check was skipped.
    """

    problem: str | None
    scale: Tensor | float | None
    weights: list[float] | None


def check_finite(
    gradients: Gradients,
    source: Source,
    nonfinite: Nonfinite,
    base: torch.optim.Optimizer,
    explain: Callable[[Mapping[str, float]], str | None] = lambda losses: None,
) -> FiniteCheck:
    """Check that losses, gradients, weights and the learning rate's factor are finite.

    All values are read in one copy from the device.

    Args:
        gradients: The gradients that the step is about to apply.
        source: The evaluations that the step has made.
        nonfinite: What to do if something is not finite.
        base: The wrapped optimizer.
        explain: Says why these losses must lead to a result that is not finite; None if it does
            not know.

    Raises:
        NonFiniteError: If something is not finite and `nonfinite` is "raise".
    """
    scale = gradients.lr_scale if gradients.scales_lr else None
    # A learning rate on the host, even in a tensor, is scaled by a float.
    device = gradients.losses.device
    rates = [group.get("lr") for group in base.param_groups] if scale is not None else []
    float_lr = any(not isinstance(rate, Tensor) or rate.device != device for rate in rates)
    if nonfinite == "ignore":
        return FiniteCheck(None, float(scale) if scale is not None and float_lr else scale, None)
    # A joint closure may have computed a loss that nobody differentiated.
    others = [name for name in source.unmeasured if name not in source.without_loss]
    gram = None if gradients.has_update else gradients.gram()
    known = next((k for k, one in enumerate(source.measured) if one.gram is gram), None)
    parts = [part for one in source.measured for part in (one.losses, one.gram.diagonal())]
    parts += [source.unmeasured[name][None] for name in others]
    if gram is None:
        parts.append(gradients.direction_bound()[None])
    elif known is None:
        parts.append(gram.diagonal())
    weights = gradients.known_weights
    if weights is None:
        parts.append(gradients.weights)
    if scale is not None:
        parts.append(scale[None])
    numbers = iter(_read(parts))
    found = [(one, next(numbers), next(numbers)) for one in source.measured]
    other_losses = [next(numbers)[0] for _ in others]
    if gram is None:
        (bound,) = next(numbers)
    else:
        squares = next(numbers) if known is None else found[known][2]
    if weights is None:
        weights = next(numbers)
    factor = None if scale is None else next(numbers)[0]
    if gram is not None:
        bound = sum(
            abs(weight) * math.sqrt(max(square, 0.0)) if square == square else math.nan
            for weight, square in zip(weights, squares, strict=True)
            if weight != 0
        )
    problem, by_itself = _first_problem(source, found)
    if problem is None:
        bad = [
            f"the loss of objective {name!r} is {loss}"
            for name, loss in zip(others, other_losses, strict=True)
            if not math.isfinite(loss)
        ]
        problem = ", ".join(bad) or None
    if problem is None and factor is not None and not math.isfinite(factor):
        problem = f"the learning rate's factor is {factor}"
    if problem is None and math.isfinite(bound) and bound > torch.finfo(gradients.dtype).max:
        bound = float(gradients.direction_norm())  # the bound may be far above the true norm
    if problem is None and not all(map(math.isfinite, (*weights, bound))):
        named = ", ".join(f"{name} {w:g}" for name, w in zip(gradients.names, weights, strict=True))
        problem = f"the transforms' result is not finite (weights: {named})"
    if problem is not None and not by_itself and not all(map(math.isfinite, weights)):
        losses = {
            name: float(loss)
            for name, loss in source.first_losses.items()
            if name not in source.without_loss
        }
        weighed = [name for name, w in zip(gradients.names, weights, strict=True) if w != 0]
        reason = None
        if all(map(math.isfinite, losses.values())):
            reason = explain({name: losses[name] for name in weighed if name in losses})
        problem = problem if reason is None else f"{reason}, so that {problem}"
    if problem is not None and nonfinite == "raise":
        raise NonFiniteError(
            f"{problem}; nothing was changed. Look at that objective's data or lower the "
            "learning rate, or pass nonfinite='skip' to gk.wrap() to pass over such steps"
        )
    return FiniteCheck(problem, factor if float_lr else scale, weights)


def _read(parts: list[Tensor]) -> list[list[float]]:
    """The elements of some vectors."""
    if parts[0].device.type == "cpu":  # where joining vectors takes longer than reading them
        return [part.tolist() for part in parts]
    return _read_at_once(parts)


def _read_at_once(parts: list[Tensor]) -> list[list[float]]:
    """The elements of some vectors, in one copy from a device."""
    values = iter(torch.cat(parts).tolist())
    return [[*islice(values, len(part))] for part in parts]


def _first_problem(
    source: Source, found: Sequence[tuple[Measurement, Sequence[float], Sequence[float]]]
) -> tuple[str | None, bool]:
    """The first value that is not finite, in words, and whether no transform can have caused it.

    The text is None if everything is finite.

    Args:
        source: The evaluations that the step has made.
        found: Each evaluation, with its losses and the squared norms of its gradients.
    """
    for number, (one, losses, squares) in enumerate(found):
        where = "" if number == 0 else f" (evaluation {number + 1} of the step)"
        bad = [
            f"the loss of objective {name!r} is {loss}{where}"
            for name, loss in zip(one.names, losses, strict=True)
            if not math.isfinite(loss) and name not in source.without_loss
        ] + [
            f"the gradient of objective {name!r} is not finite{where}"
            for name, square in zip(one.names, squares, strict=True)
            if not math.isfinite(square)
        ]
        if bad:
            # A weighted sum's gradient depends on the weights.
            own = [
                name in source.first_losses
                for name, square in zip(one.names, squares, strict=True)
                if not math.isfinite(square)
            ]
            return ", ".join(bad), number == 0 and any(own)
    return None, False
