"""Sharpness-aware minimization."""

from __future__ import annotations

from dataclasses import dataclass

from gradkit.sharpness.ascent import Ascent


@dataclass(eq=False, repr=False)
class SAM(Ascent):
    """Sharpness-aware minimization ([Foret et al., ICLR 2021](https://arxiv.org/abs/2010.01412)).

        d = ∇L(θ)
        ε = ρ·d / (‖d‖ + 1e-12)        one norm over the whole flat vector
        step on ∇L(θ + ε)

    Around other transforms, both d and the gradient at θ + ε are their directions: after PCGrad,
    both are combined by PCGrad. BatchNorm statistics are those of the first evaluation.

    Cost: two gradients of each objective; one more for each further ascent step; one in all where
    the radius is 0 in every group, so that a schedule can let it begin later. Memory: one flat
    vector (θ + ε, or a copy of the weights where they are displaced in place), with `adaptive` two.
    State: none.

    Args:
        rho: The ascent radius ρ ≥ 0. 0.05 is the authors' default for image classification.
        only: Which parameters are displaced; see `Ascent`. SAM-ON is `only="norm"`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.
        steps: How many ascent steps of length ρ/steps.
        sync_perturbation: Whether all ranks displace their weights alike; see `Ascent`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.SAM(rho=0.5))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.data  # w - 0.1 * (w + 0.5 * w / 5)
        tensor([2.6700, 3.5600])
    """
