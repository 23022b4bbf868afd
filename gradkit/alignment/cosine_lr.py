"""Learning rates scaled by the agreement of two gradients."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle, Selection
from gradkit.core.transform import Transform

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "quadratic": lambda c: (c + 1).square() / 4,
    "linear": lambda c: (c + 1) / 2,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softplus": F.softplus,
    "constant": torch.ones_like,
}
"""Functions of a cosine c: ¼(c+1)², ½(c+1), 1/(1+exp(-c)), max(0, c), ln(1+e^c), 1."""


@dataclass(eq=False)
class CosineLR(Transform):
    """Multiply the learning rate by a function of the cosine of two gradients (GraTa, AAAI 2025).

    From [Gradient Alignment Improves Test-Time Adaptation for Medical Image
    Segmentation](https://arxiv.org/abs/2408.07343), Eq. 7:

        c = ⟨g_a, g_b⟩ / (‖g_a‖·‖g_b‖)        one cosine over the whole flat vector
        η = β·f(c),   f(c) = ¼(c + 1)²        β the base optimizer's learning rate

    Every parameter group's learning rate is scaled, for this step only. If a gradient is zero, c
    is 0. The authors' code adds 1e-12 to ‖g_a‖·‖g_b‖ and scales the first group only.

    Cost: none beyond the gradients of both. State: none.

    Args:
        a: An objective.
        b: Another objective.
        activation: f: "quadratic" ¼(c+1)², "linear" ½(c+1), "sigmoid", "relu", "softplus"
            ln(1+e^c), "constant" 1 (the paper's Table 4 and a control), or a callable from
            cosine [] to factor [].

    Raises:
        ValueError: If `activation` is not one of these names and not a callable; in `step`, if the
            step lacks one of the objectives, or if the callable returns more than one number.
        TypeError: In `step`, if the callable returns something else than a number.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.CosineLR("a", "b"))
        >>> _ = optimizer.step({"a": lambda: w[0], "b": lambda: w[1]})
        >>> optimizer.last_step.lr_scale, w.data  # orthogonal: a quarter of the learning rate
        (tensor(0.2500), tensor([0.7500, 0.7500]))
    """

    a: str = "pseudo"
    b: str = "auxiliary"
    activation: str | Activation = "quadratic"

    def __post_init__(self) -> None:
        if not callable(self.activation) and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}, "
                "or pass a callable from the cosine to the factor"
            )

    def factor(self, cosine: Float[Tensor, ""]) -> int | float | Float[Tensor, ""]:
        """The learning rate's factor for a cosine.

        Raises:
            TypeError: If the activation returns something else than a number.
            ValueError: If it returns more than one number.

        Examples:
            >>> CosineLR(activation="quadratic").factor(torch.tensor(0.0))
            tensor(0.2500)
        """
        activation = self.activation if callable(self.activation) else ACTIVATIONS[self.activation]
        factor: int | float | Tensor = activation(cosine)
        if not isinstance(factor, (int, float, Tensor)):
            raise TypeError(f"the activation returned a {type(factor).__name__}; return one number")
        if isinstance(factor, Tensor) and factor.dim() != 0:
            raise ValueError(
                f"the activation returned a tensor of shape {tuple(factor.shape)}; "
                "return one number, a 0-d tensor"
            )
        return factor

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            context.require(self, self.a, self.b)
            gradients = inner(at, Selection(only, include=(self.a, self.b)))
            context.require(self, self.a, self.b)
            return gradients.with_lr_scale(self.factor(gradients.cosine(self.a, self.b)))

        return oracle
