"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkit.core.arguments import check_count, check_number
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed, needed, too_low
from gradkit.weighting.loss_weighting import LossWeighting

# Added inside logarithms, as in the authors' code, so that a loss of 0 has one.
_EPS = 1e-20


@dataclass(eq=False)
class STCH(LossWeighting):
    """Smooth Tchebycheff scalarization ([Lin et al., ICML 2024](https://arxiv.org/abs/2402.19078)).

    In the form of the authors' code for training networks, which LibMTL uses, too. With n steps per
    epoch, during warm-up (4 epochs) and one more epoch

        step on ∇ Σ ln Lᵢ
        nadirᵢ = mean Lᵢ of the last of these epochs

    and then, with xᵢ = ln(Lᵢ / nadirᵢ),

        step on ∇ μK·ln Σ exp(xᵢ/μ),        so that wᵢ = K·softmax(x/μ)ᵢ / Lᵢ

    a smooth form of K·max xᵢ, to which it tends for μ → 0; for large μ it continues the warm-up.
    The paper also weights xᵢ by a preference, which is equal for all in the code.

    Epochs are not known to a step: for the authors' schedule with n steps per epoch, set
    `warmup_steps=4 * n, nadir_steps=n`. The default is this schedule for n = 100, which the authors
    do not recommend specifically. Steps are counted for each objective separately: one that appears
    later has its own warm-up, as a further summand ln Lᵢ, while K counts the others only.

    The direction does not change if all losses, or a single one, are multiplied by s in every step.
    Negative losses and a nadir of 0 give NaN.

    Cost: none beyond the gradients. State: for each objective the number of steps, and the number
    and sum of the losses in the nadir.

    Args:
        mu: μ > 0, how smooth the maximum is.
        warmup_steps: The number of steps of the warm-up.
        nadir_steps: The number of steps after it whose mean losses are the nadir, at least 1.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range.

    Examples:
        >>> import torch, gradkit as gk
        >>> weighting = gk.STCH(warmup_steps=0, nadir_steps=1)
        >>> weighting(torch.tensor([1.0, 4.0]))  # 1/L; these losses become the nadir
        tensor([1.0000, 0.2500])
        >>> weighting(torch.tensor([1.0, 2.0]))  # 2·softmax(0, -ln 2) / L
        tensor([1.3333, 0.3333])
    """

    mu: float = 1.0
    warmup_steps: int = 400
    nadir_steps: int = 100

    def __post_init__(self) -> None:
        check_number("mu", self.mu, above=0)
        check_count("warmup_steps", self.warmup_steps, 0)
        check_count("nadir_steps", self.nadir_steps, 1)

    def init(self, count: int) -> dict[str, Tensor]:
        """The number of steps, and the number and sum of the losses in the nadir."""
        keys = ("steps", "counted", "total")
        return {key: torch.zeros(count, dtype=torch.float64) for key in keys}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        losses, first = inputs.needed_losses(self), needed(inputs.first_losses, self)
        steps, counted, total = memory["steps"], memory["counted"], memory["total"]
        done = (steps >= self.warmup_steps + self.nadir_steps) & (counted > 0)
        nadir = torch.where(done, total / counted, torch.ones_like(total))
        x = (losses / nadir + _EPS).log()
        shares = (x / self.mu).masked_fill(~done, -torch.inf).softmax(0)
        shares = torch.where(done, done.sum() * shares, torch.ones_like(shares))
        counts = (steps >= self.warmup_steps) & ~done
        # Not shares / losses: the logarithm of a negative loss is NaN.
        return shares * (-x).exp() / nadir, {
            "steps": steps + 1,
            "counted": counted + counts,
            "total": torch.where(counts, total + first, total),
        }

    def objection(self, losses: Mapping[str, float]) -> str | None:
        for place, name in enumerate(self.state["objectives"] or ()):
            steps, total = (float(self.state[key][place]) for key in ("steps", "total"))
            if name in losses and steps >= self.warmup_steps + self.nadir_steps and total == 0:
                return (
                    f"{self!r} divides losses by their means in the {self.nadir_steps} steps after "
                    f"the warm-up, and that of objective {name!r} is 0"
                )
        return too_low(self, losses, -_EPS, "no negative losses")
