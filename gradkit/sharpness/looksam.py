"""SAM whose second gradient is taken every k-th step."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_count, check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.storage import Dense
from gradkit.sharpness.ascent import Ascent, combined, projected_out


@dataclass(eq=False, repr=False)
class LookSAM(Ascent):
    """SAM whose second gradient is taken every k-th step ([Liu et al., CVPR 2022](https://arxiv.org/abs/2203.02714)).

        every k-th step:   g_s = ∇L(θ + ρ·g/‖g‖),   g_v = g_s − (g·g_s/‖g‖²)·g,   step on g_s
        between them:      step on g + α·‖g‖·g_v/‖g_v‖

    g_v, the part of SAM's gradient that is orthogonal to g, changes slowly, and is used again.
    There is no code of the authors'; k = 10 and α = 0.7 are other libraries'.

    Cost: 1 + 1/k gradients of each objective. Memory: three flat vectors, state included. State:
    g_v, one flat vector; the number of steps.

    Args:
        rho: The ascent radius ρ ≥ 0.
        k: Every how many steps the second gradient is taken; 1 is SAM.
        alpha: α, how much of g_v is added in between.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> base = torch.optim.SGD([w], lr=0.0)
        >>> optimizer = gk.wrap(base, gk.LookSAM(rho=5**0.5, k=2, alpha=0.25))
        >>> for _ in range(2):  # g = (1, 2), g_s = (2, 6), g_v = g_s - 14/5 * g = (-0.8, 0.4)
        ...     _ = optimizer.step(lambda: w[0] ** 2 / 2 + w[1] ** 2)
        >>> w.grad  # g + 0.25 * ‖g‖ * g_v / ‖g_v‖ = (1, 2) + 0.25 * (-2, 1)
        tensor([0.5000, 2.2500])
    """

    k: int = 10
    alpha: float = 0.7
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        check_number("alpha", self.alpha)
        self.state["steps"] = 0
        self._forget_norm()

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        self._forget_norm()
        return {"orthogonal": layout.zeros()}

    def _forget_norm(self) -> None:
        self._measured: tuple[int, int] | None = None
        self._gram: Float[Tensor, "1 1"] | None = None

    def _orthogonal(self, layout: Layout) -> Dense:
        """g_v, whose norm is computed once until it changes."""
        vector = self.vectors["orthogonal"]
        version = (id(vector), vector._version)
        known = Dense(vector[None], layout, self._gram if version == self._measured else None)
        self._measured, self._gram = version, known.gram("global", signs=False)
        return known

    def around(self, inner: Oracle, context: Context) -> Oracle:
        steps: int = self.state["steps"]
        context.propose(self, steps=steps + 1)

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            first = inner(at, only)
            g = first.stored()
            if steps % self.k:
                known = self._orthogonal(context.layout)
                size = known.norm()
                factor = torch.where(size > 0, self.alpha * g.norm() / size, 0 * size)
                return combined(first, context, (g, 1.0), (known, factor))
            del first  # and its rows, before the second evaluation
            above = self.climbed(inner, at, only, context, g)
            # Later evaluations are at displaced weights.
            if "orthogonal" not in context.proposed(self):
                g_s = above.stored()
                share = projected_out(g_s, g, context)
                v = context.sum_of((g_s.vector, 1.0), (g.vector, -share))
                context.propose(self, orthogonal=v)
            return above.with_update(above.stored())

        return oracle
