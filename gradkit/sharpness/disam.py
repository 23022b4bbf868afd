"""Domain-inspired sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, check_one_step


@dataclass(eq=False, repr=False)
class DISAM(Ascent):
    """Domain-inspired SAM ([Zhang et al., ICLR 2024](https://arxiv.org/abs/2405.18861)).

    With one objective for each of K domains:

        g = ∇[1/K·Σ_k L_k − λ·Var_k(L_k)] = Σ_k (1 − 2·λ·(L_k − L̄))/K·∇L_k
        step on 1/K·Σ_k ∇L_k(θ + ρ·g/(‖g‖ + 1e-12))

    Domains whose loss is above the mean have less say in the ascent, which otherwise follows those
    that have converged least. The variance is the population's. The authors' code takes the mean
    loss over all samples of a batch, which is the same for domains with equally many.

    Cost: two gradients of each domain. Memory: K + 2 flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0.
        lmbda: λ ≥ 0, the weight of the variance; 0 is SAM on the domains' mean.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.DISAM(rho=5**0.5, lmbda=0.25))
        >>> _ = optimizer.step({"a": lambda: w[0] ** 2, "b": lambda: 3 * w[1] ** 2})
        >>> w.grad  # weights 1.5/2 and 0.5/2, so that g = (1.5, 1.5): (1 + e) * (1, 3), e = 1.5811
        tensor([2.5811, 7.7434])
    """

    lmbda: float = 0.1
    needs_several = True
    joins = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lmbda", self.lmbda, least=0)
        check_one_step(self)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            first = inner(at, only)
            active = list(first.active)
            if not active:
                return first
            context.require_losses(self, [first.names[k] for k in active])
            losses = first.losses.to(first.weights)
            every = len(active) == len(losses)  # indexing by a list makes the host wait for a GPU
            excess = losses - (losses if every else losses[active]).mean()
            share = (1 - 2 * self.lmbda * excess) / len(active)
            point = self.above(first.reweighted(share), at, context)
            count = len(active)
            del first  # and its rows, before the second evaluation
            there = inner(point, only)
            return there.reweighted(torch.full_like(there.weights, 1 / count))

        return oracle
