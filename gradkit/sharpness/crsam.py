"""Curvature-regularised sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, Radius, check_one_step, combined


@dataclass(eq=False, repr=False)
class CRSAM(Ascent):
    """Curvature regularised SAM ([Wu et al., AAAI 2024](https://arxiv.org/abs/2312.13555)).

        g = ∇L(θ),   ε = ρ·g/(‖g‖ + 1e-12),   g₊ = ∇L(θ + ε),   g₋ = ∇L(θ − ε)
        step on g₊ + γ·(g₊ + g₋ − 2·g) + β·(g₊ − g₋)

    The second term is that of the normalised Hessian trace, by finite differences.

    Cost: three gradients of each objective. Memory: three flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        gamma: γ, the weight of the curvature.
        beta: β, the weight of the gradients' difference; 0.01 is the authors' script, 0.1 their
            class.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> base = torch.optim.SGD([w], lr=1.0)
        >>> optimizer = gk.wrap(base, gk.CRSAM(rho=0.5, gamma=0.1, beta=0.0))
        >>> _ = optimizer.step(lambda: w.pow(3).sum() / 3)
        >>> w.grad  # 2.5² + 0.1 * (2.5² + 1.5² - 2 * 2²)
        tensor([6.3000])
    """

    rho: Radius = 0.1
    gamma: float = 0.1
    beta: float = 0.01
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma)
        check_number("beta", self.beta)
        check_one_step(self)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g = inner(at, only).stored()
            rise, here = self.rise_along(g, at, context), context.point(at)
            above = inner(here + rise, only)
            down = inner(here - rise, only).stored()
            return combined(
                above,
                context,
                (above.stored(), 1 + self.gamma + self.beta),
                (down, self.gamma - self.beta),
                (g, -2 * self.gamma),
            )

        return oracle
