"""Looking for NaNs and infinities, with one copy from the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradkit.core.gradients import Gradients
from gradkit.core.gram import accumulator

Nonfinite = Literal["raise", "skip", "ignore"]
NONFINITE: tuple[Nonfinite, ...] = ("raise", "skip", "ignore")


class NonFiniteError(FloatingPointError, RuntimeError):
    """A loss or a gradient is NaN or infinite."""


@runtime_checkable
class Source(Protocol):
    """Where a step's gradients come from, as far as it matters here."""

    measured: list[Gradients]
    without_loss: set[str]
    first_losses: dict[str, Tensor]


class Verdict(NamedTuple):
    """What the host learns of a step's numbers."""

    culprit: str | None
    scale: Tensor | float | None
    weights: list[float] | None


def judge(
    gradients: Gradients,
    source: Source,
    nonfinite: Nonfinite,
    base: torch.optim.Optimizer,
    explain: Callable[[Mapping[str, float]], str | None] = lambda losses: None,
) -> Verdict:
    """Whether all is finite, and what the host needs to know; one copy from the device.

    Args:
        gradients: What the step is to apply.
        source: What has been evaluated for it.
        nonfinite: What to do if something is not finite.
        base: The wrapped optimizer.
        explain: Says why these losses could not lead to anything finite, if it knows.
    """
    scale = gradients.lr_scale if gradients.scales_lr else None
    # A learning rate that the host holds, be it in a tensor, is scaled by a number of its own.
    device = gradients.weights.device
    rates = [group.get("lr") for group in base.param_groups]
    float_lr = scale is not None and any(
        not isinstance(rate, Tensor) or rate.device != device for rate in rates
    )
    if nonfinite == "ignore":
        return Verdict(None, float(scale) if scale is not None and float_lr else scale, None)
    wide = accumulator(gradients.weights.device)
    parts = [gradients.weights]
    if scale is not None:
        parts.append(scale[None])
    if gradients.has_update:
        parts.append(gradients.direction_norm()[None])
    else:
        parts.append(gradients.gram().diagonal())
    for one in source.measured:
        parts += [one.losses, one.gram().diagonal()]
    # A joint closure may have computed a loss that nobody differentiated.
    firsts = [name for name in source.first_losses if name not in source.without_loss]
    parts += [source.first_losses[name][None] for name in firsts]
    values = torch.cat([part.to(wide) for part in parts]).tolist()
    values, first_losses = values[: len(values) - len(firsts)], values[len(values) - len(firsts) :]
    count = len(gradients.names)
    weights, rest = values[:count], values[count:]
    factor = rest.pop(0) if scale is not None else None
    if gradients.has_update:
        bound = rest.pop(0)
    else:
        squares, rest = rest[:count], rest[count:]
        bound = sum(
            abs(weight) * math.sqrt(max(square, 0.0)) if square == square else math.nan
            for weight, square in zip(weights, squares, strict=True)
            if weight != 0
        )
    culprit, by_itself = _culprit(source, rest)
    if culprit is None:
        bad = [
            f"the loss of objective {name!r} is {loss}"
            for name, loss in zip(firsts, first_losses, strict=True)
            if not math.isfinite(loss)
        ]
        culprit = ", ".join(bad) or None
    if culprit is None and factor is not None and not math.isfinite(factor):
        culprit = f"the learning rate's factor is {factor}"
    if culprit is None and math.isfinite(bound) and bound > torch.finfo(gradients.dtype).max:
        bound = float(gradients.direction_norm())  # the bound may be far above the numbers
    if culprit is None and not all(map(math.isfinite, (*weights, bound))):
        named = ", ".join(f"{name} {w:g}" for name, w in zip(gradients.names, weights, strict=True))
        culprit = f"the transforms' result is not finite (weights: {named})"
    if culprit is not None and not by_itself and not all(map(math.isfinite, weights)):
        weighed = [name for name, w in zip(gradients.names, weights, strict=True) if w != 0]
        known = dict(zip(firsts, first_losses, strict=True))
        found = {name: known[name] for name in weighed if name in known}
        reason = explain(found) if all(map(math.isfinite, first_losses)) else None
        culprit = culprit if reason is None else f"{reason}, so that {culprit}"
    if culprit is not None and nonfinite == "raise":
        raise NonFiniteError(
            f"{culprit}; nothing was changed. Look at that objective's data or lower the "
            "learning rate, or pass nonfinite='skip' to gk.wrap() to pass over such steps"
        )
    return Verdict(culprit, factor if float_lr else scale, weights)


def _culprit(source: Source, values: Sequence[float]) -> tuple[str | None, bool]:
    """What is not finite first, in words, and whether no transform can have caused it.

    None if everything is finite.
    """
    position = 0
    for number, one in enumerate(source.measured):
        count = len(one.names)
        losses = values[position : position + count]
        squares = values[position + count : position + 2 * count]
        position += 2 * count
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
