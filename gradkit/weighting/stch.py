"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import RuleInputs, needed, too_low
from gradkit.surgery.memory import Remembered, Weighed
from gradkit.weighting.loss_weighting import LossWeighting, check_count

# Added within logarithms, as in the authors' code: a loss of 0 has one then.
_EPS = 1e-20


@dataclass(eq=False)
class STCH(LossWeighting):
    """Smooth Tchebycheff scalarization ([Lin et al., ICML 2024](https://arxiv.org/abs/2402.19078)).

    In the form of the authors' code for training networks, which LibMTL has taken over. With n
    steps an epoch, during warm-up (4 epochs) and one epoch more

        step on ∇ Σ ln Lᵢ
        nadirᵢ = mean Lᵢ of the last of these epochs

    and then, with xᵢ = ln(Lᵢ / nadirᵢ),

        step on ∇ μK·ln Σ exp(xᵢ/μ),        so that wᵢ = K·softmax(x/μ)ᵢ / Lᵢ

    a smooth form of K·max xᵢ, which it tends to as μ tends to 0; a large μ goes on as the warm-up.
    The paper weights xᵢ by a preference too, which the code leaves equal.

    A step does not know of epochs: n steps an epoch mean `warmup_steps=4 * n, nadir_steps=n` for
    the authors' schedule. The default is that for n = 100; it is no recommendation of theirs. Steps
    are counted for each objective by itself: one that comes later has its own warm-up, as a further
    summand ln Lᵢ, while K counts the others only.

    Losses multiplied by s, in every step, leave the direction as it is, and so does a single one of
    them. Losses must not be negative, nor a nadir be 0: either gives NaN.

    Cost: none beyond the gradients. State: of each objective the number of steps and the sum of the
    losses that the nadir is the mean of.

    Args:
        mu: μ > 0, how smooth the maximum is.
        warmup_steps: The steps of the warm-up.
        nadir_steps: The further steps whose mean losses are the nadir, at least 1.

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
        check_number("mu", self.mu)
        if not self.mu > 0:
            raise ValueError(f"mu is {self.mu}; it must be positive")
        check_count("warmup_steps", self.warmup_steps, 0)
        check_count("nadir_steps", self.nadir_steps, 1)

    def init(self, count: int) -> dict[str, Tensor]:
        """Steps, and how many losses the nadir is the mean of, with their sum."""
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
        return too_low(self, losses, -_EPS, "no negative losses")
