"""Adaptive sharpness-aware minimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradkit.sharpness.ascent import Ascent, Radius


@dataclass(eq=False, repr=False)
class ASAM(Ascent):
    """Adaptive SAM ([Kwon et al., ICML 2021](https://arxiv.org/abs/2102.11600)).

        T = |w| + η for weights, 1 for biases       elementwise
        ε = ρ·T²·d / (‖T·d‖ + 1e-12),   d = ∇L(w)
        step on ∇L(w + ε)

    The ascent does not change when the weights of a layer are scaled up and those of the next one
    down. It is `SAM(adaptive=True)` with the authors' radius. Weights are parameters called
    "weight", as in the authors' code; `adaptive="all"` scales biases, too.

    Cost: two gradients of each objective. Memory: two flat vectors. State: none.

    Args:
        rho: The ascent radius ρ ≥ 0; about ten times that of SAM.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: True for weights, "all" for biases, too.
        eta: η ≥ 0; the authors' class has 0.01, their example 0.
        steps: How many ascent steps of length ρ/steps.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0]])
        >>> optimizer = gk.wrap(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), gk.ASAM(rho=0.5, eta=0.0), model=model
        ... )
        >>> _ = optimizer.step(lambda: model.weight.square().sum() / 2)
        >>> model.weight.data  # w - 0.1 * (w + 0.5 * (27, 64) / ‖(9, 16)‖)
        tensor([[2.6265, 3.4257]])
    """

    rho: Radius = 0.5
    adaptive: bool | Literal["all"] = True
