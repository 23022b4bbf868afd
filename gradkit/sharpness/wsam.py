"""Sharpness as a weighted part of the loss."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, check_synchronised, combined


@dataclass(eq=False, repr=False)
class WSAM(Ascent):
    """Weighted SAM ([Yue et al., KDD 2023](https://arxiv.org/abs/2305.15817)).

        g = ∇L(θ),   g_s = ∇L(θ + ρ·g/‖g‖),   a = γ/(1 − γ)
        decoupled:   the base steps on g, and then θ ← θ − η·a·(g_s − g)
        coupled:     the base steps on (1 − a)·g + a·g_s

    γ = 1/2 is SAM. Decoupled, the sharpness term g_s − g does not enter the base's momentum; η is
    each parameter group's learning rate, with what transforms have multiplied it by. The authors'
    code clips each gradient before they are combined; here `wrap(max_norm=)` clips what the base
    gets.

    Cost: two gradients of each objective. Memory: two flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        gamma: γ in [0, 1), the weight of the sharpness.
        decouple: Whether the sharpness term is applied by itself.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.WSAM(rho=0.5, gamma=0.75))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.data  # w - 0.1 * (w + 3 * 0.5 * w / 5)
        tensor([2.6100, 3.4800])
    """

    gamma: float = 0.9
    decouple: bool = True
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, least=0, below=1)
        self._difference: Tensor | None = None
        if self.decouple:
            check_synchronised(self, "what decouple=True adds must be alike on all ranks")

    def around(self, inner: Oracle, context: Context) -> Oracle:
        a = self.gamma / (1 - self.gamma)
        self._difference = None

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g = inner(at, only).stored()
            above = self.climbed(inner, at, only, context, g)
            g_s = above.stored()
            if not self.decouple:
                return combined(above, context, (g, 1 - a), (g_s, a))
            self._difference = context.sum_of((g_s.vector, 1.0), (g.vector, -1.0))
            return above.with_update(g)

        return oracle

    def after_step(self, context: Context) -> None:
        if self._difference is None or context.gradients is None:
            return
        rates = context.group_values("lr", 0.0)
        factor = self.gamma / (1 - self.gamma) * context.gradients.lr_scale
        context.move_weights(context.displaced_by_group(None, self._difference, rates) * -factor)
        self._difference = None
