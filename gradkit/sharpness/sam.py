"""Sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Displacement, Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform


@dataclass(eq=False)
class SAM(Transform):
    """Sharpness-aware minimization ([Foret et al., ICLR 2021](https://arxiv.org/abs/2010.01412)).

        d = ∇L(θ)
        ε = ρ·d / (‖d‖ + 1e-12)        one norm over the whole flat vector
        step on ∇L(θ + ε)

    Around other transforms, both d and the gradient at θ + ε are their directions: after PCGrad,
    both are combined by PCGrad. BatchNorm statistics are those of the first evaluation.

    Cost: two gradients of each objective. Memory: one flat vector (a copy of the weights; with the
    engine "functional", θ + ε). State: none.

    Args:
        rho: The ascent radius ρ ≥ 0. 0.05 is the authors' default for image classification.

    Raises:
        TypeError: If `rho` is not a number.
        ValueError: If it is negative or not finite.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.SAM(rho=0.5))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.data  # w - 0.1 * (w + 0.5 * w / 5)
        tensor([2.6700, 3.5600])
    """

    rho: float = 0.05
    needs_rows = False

    def __post_init__(self) -> None:
        if not isinstance(self.rho, str) and not self.rho >= 0:
            raise ValueError(f"rho is {self.rho}; the ascent radius must be at least 0")
        check_number("rho", self.rho)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            # No variable keeps the first evaluation or the displaced point, so that their memory is
            # freed as soon as it is no longer needed.
            return inner(self._ascent(inner(at, only), at, context), only)

        return oracle

    def _ascent(
        self,
        gradients: Gradients,
        at: Point | None,
        context: Context,
    ) -> Displacement:
        parts = gradients.parts
        direction = gradients.direction() if parts is None else parts
        norm = gradients.direction_norm(direction if isinstance(direction, Tensor) else None)
        return context.displaced(at, direction, self.rho / (norm + 1e-12))
