"""Sharpness-aware gradient matching."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, check_one_step, combined


@dataclass(eq=False, repr=False)
class SAGM(Ascent):
    """Sharpness-aware gradient matching ([Wang et al., CVPR 2023](https://arxiv.org/abs/2303.10353)).

        g = ∇L(θ)
        ε = ρ·g/(‖g‖ + 1e-12) − α·g
        step on ½·(g + ∇L(θ + ε))

    The term −α·g asks the gradients at θ and at θ + ρ·g/‖g‖ to agree, to first order.

    Cost: two gradients of each objective. Memory: two flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        alpha: α, how far the point moves back along the gradient; the authors take 0.0005 on their
            larger data.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.SAGM(rho=0.5, alpha=0.02))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.grad  # (w + w + (0.1 - 0.02) * w) / 2
        tensor([3.1200, 4.1600])
    """

    alpha: float = 0.001
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_one_step(self)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g = inner(at, only).stored()
            point = context.displaced(at, g.vector, -self.alpha) + self.rise_along(g, at, context)
            above = inner(point, only)
            return combined(above, context, (g, 0.5), (above.stored(), 0.5))

        return oracle
