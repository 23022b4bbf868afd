"""Objectives that return one loss per sample, and what a transform makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class SampleLosses(Protocol):
    """What a transform makes of per-sample losses in one evaluation; see `Context.sampling`."""

    def scalar(self, name: str, losses: Tensor) -> Float[Tensor, ""]:
        """The objective's loss, which is back-propagated.

        Args:
            name: The objective.
            losses: What the objective has returned: one loss per sample [N], or one number []. With
                micro-batches there is one call for each, in order.

        Raises:
            ValueError: If the transform cannot work with these losses.
        """

    def chosen(self, name: str, losses: Float[Tensor, " N"]) -> Int[Tensor, " k"]:
        """The indices of the samples that the objective is to be evaluated on again.

        It is asked only if `chooses`, and if the closure takes an argument `samples`.
        """

    @property
    def chooses(self) -> bool:
        """Whether some samples may be left out."""


def takes_samples(closure: Callable[..., Any]) -> bool:
    """Whether a closure takes an argument `samples`, the indices of samples to evaluate.

    Examples:
        >>> takes_samples(lambda samples=None: 0), takes_samples(lambda: 0)
        (True, False)
    """
    try:
        return "samples" in inspect.signature(closure).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False
