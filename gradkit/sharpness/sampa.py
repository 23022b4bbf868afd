"""SAM whose two gradients do not depend on each other."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, Radius, check_one_step, combined


@dataclass(eq=False, repr=False)
class SAMPa(Ascent):
    """Parallelised SAM ([Xie et al., NeurIPS 2024](https://arxiv.org/abs/2410.10683)).

        x̃ = x + ρ·g_y/‖g_y‖,   y⁺ = x − η·g_y
        step on (1 − λ)·∇L(x̃) + λ·∇L(y⁺),   g_y ← ∇L(y⁺)

    The ascent goes along the gradient at the auxiliary point y, which the step before has
    evaluated, so that the two gradients of a step do not depend on each other. (Here they are taken
    one after the other.) η is each parameter group's learning rate. The first step, which has no
    g_y yet, takes ∇L(x).

    Both gradients are of the present batch, and y⁺ is a plain step. In the authors' code for two
    processes ∇L(x̃) is that of the batch before, of which g_y is the gradient, the step to y⁺ has
    the base's momentum and weight decay, and the first g_y is 0.

    Cost: two gradients of each objective; three in the first step. Memory: four flat vectors,
    state included. State: g_y, one flat vector; whether there is one.

    Args:
        rho: The ascent radius ρ ≥ 0.
        lmbda: λ in [0, 1], the weight of the gradient at y⁺.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.SAMPa(rho=0.5))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.grad  # 0.8 * 1.1 * w + 0.2 * 0.9 * w
        tensor([3.1800, 4.2400])
    """

    rho: Radius = 0.1
    lmbda: float = 0.2
    sets_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lmbda", self.lmbda, least=0, most=1)
        check_one_step(self)
        self.state["seen"] = False

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return {"gradient": layout.zeros()}

    def around(self, inner: Oracle, context: Context) -> Oracle:
        rates = context.group_values("lr", 0.0)

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            known = self.state["seen"]
            before = self.vectors["gradient"] if known else inner(at, only).stored().vector
            here, rise = context.point(at), self.rise_along(before, at, context)
            g_y = inner(here - context.displaced_by_group(None, before, rates), only).stored()
            if not context.proposed(self):  # later evaluations are at displaced weights
                context.propose(self, gradient=context.displaced(None, g_y.vector), seen=True)
            ahead = inner(here + rise, only)
            return combined(ahead, context, (ahead.stored(), 1 - self.lmbda), (g_y, self.lmbda))

        return oracle
