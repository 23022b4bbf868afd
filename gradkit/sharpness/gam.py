"""Gradient norm aware minimization."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.storage import Dense
from gradkit.sharpness.ascent import Ascent, Radius, check_one_step, combined, projected_out


@dataclass(eq=False, repr=False)
class GAM(Ascent):
    """Gradient norm aware minimization ([Zhang et al., CVPR 2023](https://arxiv.org/abs/2303.03108)).

        g₀ = ∇L(θ),                g₁ = ∇L(θ + ρ'·g₀/‖g₀‖),   h = g₁ − g₀
        g₂ = ∇L(θ + ρ·h/‖h‖),      g₃ = ∇L(θ + ρ·h/‖h‖ + ρ'·g₂/‖g₂‖)
        a = α·g₁ + (1 − α)·g₃,     m = g₀ + (1 − β)·g₂
        step on a − γ·(m − (m·a/‖a‖²)·a)

    h is the gradient of ‖∇L‖, up to a factor, by a finite difference, so that the weights at
    θ + ρ·h/‖h‖ have the largest gradient near θ. Rule and defaults are those of the authors' code,
    for a ResNet on CIFAR-100; others are ρ = 0.2, ρ' = 0.03, β = 0.1, α = 0.1, γ = 0.05 for
    CIFAR-10, and ρ = 0.2, ρ' = 0.04, β = 0.3, α = 0.5, γ = 0.05 for a PyramidNet.

    Cost: four gradients of each objective. Memory: six flat vectors. State: none.

    Args:
        rho: ρ ≥ 0, how far the gradient's norm is maximised.
        rho_inner: ρ' ≥ 0, the radius of SAM's ascent in both places.
        alpha: α, the weight of the gradient near θ.
        beta: β; 1 − β is the weight of g₂ in m.
        gamma: γ, how much of m's orthogonal part is descended.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.GAM(rho=0.5, rho_inner=0.5))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.grad  # all along w: 0.6 * (1.1 * w) + 0.4 * (1.2 * w)
        tensor([3.4200, 4.5600])
    """

    rho: Radius = 0.2
    rho_inner: float = 0.02
    alpha: float = 0.6
    beta: float = 0.5
    gamma: float = 0.03
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.rho):
            raise TypeError(
                f"rho is {self.rho!r}; GAM has two radii in a fixed proportion, so pass a number"
            )
        if self.rho == 0:
            raise ValueError("rho is 0; the gradient's norm is maximised within a positive radius")
        check_number("rho_inner", self.rho_inner, least=0)
        for name in ("alpha", "beta", "gamma"):
            check_number(name, getattr(self, name))
        check_one_step(self)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            assert not callable(self.rho)  # __post_init__
            here, share = context.point(at), self.rho_inner / self.rho
            g0 = inner(at, only).stored()
            g1 = inner(here + self.rise_along(g0, at, context) * share, only).stored()
            h = context.sum_of((g1.vector, 1.0), (g0.vector, -1.0))
            there = here + self.rise_along(h, at, context)
            g2 = inner(there, only).stored()
            last = inner(there + self.rise_along(g2, there, context) * share, only)
            g3 = last.stored().vector
            a, m = (
                Dense(context.sum_of(*terms)[None], context.layout)
                for terms in (
                    ((g1.vector, self.alpha), (g3, 1 - self.alpha)),
                    ((g0.vector, 1.0), (g2.vector, 1 - self.beta)),
                )
            )
            factor = projected_out(m, a, context)
            return combined(last, context, (a, 1 + self.gamma * factor), (m, -self.gamma))

        return oracle
