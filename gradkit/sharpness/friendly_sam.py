"""Friendly sharpness-aware minimization."""

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
class FriendlySAM(Ascent):
    """Friendly SAM ([Li et al., CVPR 2024](https://arxiv.org/abs/2403.12350)).

        g = ∇L(θ)
        d = g − σ·m                       in the first step d = g, and then m ← g
        m ← λ·m + (1 − λ)·g
        step on ∇L(θ + ρ·d/(‖d‖ + 1e-12))

    m follows the full batch's gradient, so that the ascent goes along the batch's own noise. The
    order and the first step are those of the authors' code.

    Cost: two gradients of each objective. Memory: four flat vectors, state included. State: m, one
    flat vector; whether there is one.

    Args:
        rho: The ascent radius ρ ≥ 0. 0.05 is the authors' class; their scripts take 0.1 and 0.2.
        sigma: σ, how much of the full batch's gradient is taken away.
        lmbda: λ in [0, 1), how slowly m follows; the scripts take 0.95 and 0.6.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.FriendlySAM(rho=0.5))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.data  # the first step is SAM's
        tensor([2.6700, 3.5600])
        >>> optimizer.transforms[0].vectors["mean"]
        tensor([3., 4.])
    """

    sigma: float = 1.0
    lmbda: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma)
        check_number("lmbda", self.lmbda, least=0, below=1)
        check_one_step(self)
        self.state["seen"] = False

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return {"mean": layout.zeros()}

    def completed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved state; those of earlier versions had a mean from the start."""
        return {"seen": True, **saved}

    def around(self, inner: Oracle, context: Context) -> Oracle:

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g, mean = inner(at, only).stored().vector, self.vectors["mean"]
            if not context.proposed(self):  # later evaluations are at displaced weights
                share = 1 - self.lmbda if self.state["seen"] else 1.0
                new = context.displaced(None, mean, self.lmbda).plus(g, share)
                context.propose(self, mean=new, seen=True)
            d = context.sum_of((g, 1.0), (mean, -self.sigma))
            return inner(context.point(at) + self.rise_along(d, at, context), only)

        return oracle
