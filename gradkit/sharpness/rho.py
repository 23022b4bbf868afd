"""Ascent radii that follow the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number


@dataclass(frozen=True)
class RhoByLR:
    """An ascent radius that is linear in the learning rate ([Zhuang et al., ICLR 2022](https://arxiv.org/abs/2203.08065)).

        ρ = rho_min + (rho_max − rho_min)·(lr − lr_min)/(lr_max − lr_min)

    GSAM's schedule, for every method with an ascent: pass it as `rho`. It has no state of its own:
    the learning rate is that of each parameter group at the time of the step, whichever scheduler
    has set it. Outside [lr_min, lr_max] the radius is that of the nearer end.

    Args:
        rho_max: The radius at `lr_max`, at least 0.
        rho_min: The radius at `lr_min`, at least 0.
        lr_max: The largest learning rate.
        lr_min: The smallest learning rate.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a radius is negative, or `lr_min` is not less than `lr_max`.

    Examples:
        >>> import torch, gradkit as gk
        >>> rho = gk.sharpness.RhoByLR(rho_max=0.5, rho_min=0.1, lr_max=0.1)
        >>> [round(rho(lr), 3) for lr in (0.1, 0.05, 0.0)]
        [0.5, 0.3, 0.1]
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.GSAM(rho=rho))
        >>> schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    """

    rho_max: float
    rho_min: float
    lr_max: float
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        check_number("rho_max", self.rho_max, least=0)
        check_number("rho_min", self.rho_min, least=0)
        check_number("lr_max", self.lr_max)
        check_number("lr_min", self.lr_min, below=self.lr_max)

    def __call__(self, lr: float | Float[Tensor, ""]) -> float:
        """The radius at a learning rate."""
        share = (float(lr) - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * min(max(share, 0.0), 1.0)
