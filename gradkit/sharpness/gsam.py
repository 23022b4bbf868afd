"""Surrogate gap guided sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, combined, projected_out


@dataclass(eq=False, repr=False)
class GSAM(Ascent):
    """Surrogate gap guided SAM ([Zhuang et al., ICLR 2022](https://arxiv.org/abs/2203.08065)).

        g = ∇L(θ),   g_s = ∇L(θ + ρ·g/‖g‖)
        step on g_s − α·(g − (g·g_s/‖g_s‖²)·g_s)

    The part of g that is orthogonal to g_s is descended, which lowers the gap between the two
    losses without raising L(θ + ε). The authors let ρ follow the learning rate, as
    `gk.sharpness.RhoByLR` does; a schedule may also write the entry "rho" of the base optimizer's
    groups.

    Cost: two gradients of each objective. Memory: two flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        alpha: α, how much of the orthogonal part is descended; 0 is SAM.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.GSAM(rho=5**0.5, alpha=0.5))
        >>> _ = optimizer.step(lambda: w[0] ** 2 / 2 + w[1] ** 2)  # g = (1, 2), g_s = (2, 6)
        >>> w.grad  # g_s - 0.5 * (g - 14/40 * g_s)
        tensor([1.8500, 6.0500])
    """

    alpha: float = 0.4
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g = inner(at, only).stored()
            above = self.climbed(inner, at, only, context, g)
            g_s = above.stored()
            share = projected_out(g, g_s, context)
            return combined(above, context, (g_s, 1 + self.alpha * share), (g, -self.alpha))

        return oracle
