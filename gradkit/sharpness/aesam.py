"""SAM where the gradient is large only."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from gradkit.core.arguments import check_count, check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, check_synchronised


@dataclass(eq=False, repr=False)
class AESAM(Ascent):
    """Adaptive policy for SAM ([Jiang et al., ICLR 2023](https://arxiv.org/abs/2304.14647)).

        μ ← δ·μ + (1 − δ)·‖g‖²,   σ² ← δ·σ² + (1 − δ)·(‖g‖² − μ)²       g = ∇L(θ)
        where ‖g‖² ≥ μ + c_t·σ:   step on ∇L(θ + ρ·g/‖g‖), else on g
        c_t from λ₂ in the first step to λ₁ in the last one, linearly

    The authors' code has not been seen: rule and defaults are from the paper's text. μ and σ start
    at the first gradient's square and 0.

    The host reads ‖g‖² in every step. Cost: one gradient of each objective, or two. Memory: two
    flat vectors, state included. State: μ, σ² and the number of steps.

    Args:
        rho: The ascent radius ρ ≥ 0.
        lambda_1: λ₁, c in the last step.
        lambda_2: λ₂, c in the first step.
        delta: δ in [0, 1), how slowly μ and σ² follow.
        total_steps: The number of steps of the training; None keeps c at (λ₁ + λ₂)/2.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.AESAM(rho=0.5))
        >>> for factor in (1.0, 0.1):  # a gradient that is as large as usual, and a small one
        ...     _ = optimizer.step(lambda: factor * w.square().sum() / 2)
        ...     print(w.data)  # w - 0.1 * 1.1 * w, and then w - 0.1 * 0.1 * w
        tensor([2.6700, 3.5600])
        tensor([2.6433, 3.5244])
    """

    lambda_1: float = -1.0
    lambda_2: float = 1.0
    delta: float = 0.9
    total_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_synchronised(self, "all ranks climb in the same steps")
        check_number("lambda_1", self.lambda_1)
        check_number("lambda_2", self.lambda_2)
        check_number("delta", self.delta, least=0, below=1)
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps)
        self.state.update(steps=0, mean=0.0, variance=0.0)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        state, climbs = dict(self.state), None

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            nonlocal climbs
            first = inner(at, only)
            if climbs is None:  # decided once for the whole step
                climbs = self._climbs(float(first.direction_norm()) ** 2, state)
                context.propose(self, **state)
            if not climbs:
                return first
            g = first.stored()
            del first  # and its rows, before the second evaluation
            return self.climbed(inner, at, only, context, g)

        return oracle

    def _climbs(self, square: float, state: dict[str, Any]) -> bool:
        """Whether the step is SAM's; brings the state up to date."""
        mean = square
        if state["steps"] > 0:
            mean = self.delta * state["mean"] + (1 - self.delta) * square
        state["mean"] = mean
        variance = self.delta * state["variance"] + (1 - self.delta) * (square - mean) ** 2
        state["variance"] = variance
        share = 0.5
        if self.total_steps is not None:
            share = min(state["steps"] / max(self.total_steps - 1, 1), 1.0)
        state["steps"] += 1
        c = share * self.lambda_1 + (1 - share) * self.lambda_2
        return bool(square >= mean + c * variance**0.5)
