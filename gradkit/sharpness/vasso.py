"""Variance-suppressed sharpness-aware optimization."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, check_one_step


@dataclass(eq=False, repr=False)
class VaSSO(Ascent):
    """Variance-suppressed SAM ([Li & Giannakis, NeurIPS 2023](https://arxiv.org/abs/2309.15639)).

        d ← (1 − θ)·d + θ·∇L(w)           in the first step d = ∇L(w), as in the authors' code
        step on ∇L(w + ρ·d/(‖d‖ + 1e-12))

    The ascent goes along a running mean of gradients, whose variance is smaller than a batch's. The
    authors add 1e-7 to ‖d‖.

    Cost: two gradients of each objective. Memory: four flat vectors, state included. State: d, one
    flat vector; whether there is one.

    Args:
        rho: The ascent radius ρ ≥ 0; the authors take 0.05 to 0.2.
        theta: θ in (0, 1], how fast d follows; 1 is SAM.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.VaSSO(rho=0.5))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.data  # the first step is SAM's
        tensor([2.6700, 3.5600])
    """

    theta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("theta", self.theta, above=0, most=1)
        check_one_step(self)
        self.state["seen"] = False

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return {"mean": layout.zeros()}

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved state; those of earlier versions had a mean from the start."""
        return {"seen": True, **saved}

    def around(self, inner: Oracle, context: Context) -> Oracle:

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g = inner(at, only).stored().vector
            share = self.theta if self.state["seen"] else 1.0
            d = context.sum_of((self.vectors["mean"], 1 - self.theta), (g, share))
            if not context.proposed(self):  # later evaluations are at displaced weights
                context.propose(self, mean=d, seen=True)
            return inner(context.point(at) + self.rise_along(d, at, context), only)

        return oracle
