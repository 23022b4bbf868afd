"""The weight of the divergence between domains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradkit.core.arguments import check_count, check_number
from gradkit.core.context import Context
from gradkit.core.gradients import Gradients
from gradkit.core.transform import Reweighing, Weigh
from gradkit.divergence.histogram import HistogramDivergence

TASK, DIVERGENCE = "task", "divergence"
"""The objectives of DiM. Further ones count as the task."""


@dataclass(eq=False)
class DivergenceWeight(Reweighing):
    """Weigh the objective "divergence" by λ, which may rise; a part of `gk.DiM`.

        step on ∇[L_task + λ(t)·D]
        λ(t) = λ                                       without a ramp
        λ(t) = λ·exp(−5·(1 − min(t/T, 1))²)            t the steps applied so far

    The ramp is that of the consistency term in [temporal ensembling (Laine and Aila, ICLR
    2017)](https://arxiv.org/abs/1610.02242), which semi-supervised segmentation, MiDSS included,
    uses over the whole training. That DiM has it is our reconstruction; see `gk.DiM`. A
    `HistogramDivergence` in `model=` learns here when a step begins.

    Cost: none beyond the gradients. State: the number of steps.

    Args:
        weight: λ ≥ 0. With 0 the divergence is recorded only.
        ramp: T, the number of steps over which λ(t) rises to λ; None for a constant.

    Raises:
        TypeError: If `weight` is not a number, or `ramp` not a whole number.
        ValueError: If `weight` is negative or not finite, or `ramp` less than 1; in `step`, if the
            step lacks the objective "task" or "divergence".

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> weight = gk.divergence.DivergenceWeight(0.5)
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), weight)
        >>> _ = optimizer.step({"task": lambda: w.sum(), "divergence": lambda: 4 * w.sum()})
        >>> w.data  # 1 - 0.1 * (1 + 0.5 * 4)
        tensor([0.7000])
        >>> ramped = gk.divergence.DivergenceWeight(0.1, ramp=100)
        >>> [round(ramped.at(steps), 4) for steps in (0, 50, 100, 150)]
        [0.0007, 0.0287, 0.1, 0.1]
    """

    weight: int | float = 0.1
    ramp: int | None = None

    needs_rows = False
    never_zero = True

    def __post_init__(self) -> None:
        check_number("weight", self.weight, least=0)
        if self.ramp is not None:
            check_count("ramp", self.ramp)
        self.state["steps"] = 0

    def at(self, steps: int) -> float:
        """λ after so many applied steps."""
        if self.ramp is None:
            return float(self.weight)
        return self.weight * math.exp(-5 * (1 - min(steps / self.ramp, 1)) ** 2)

    def weigher(self, context: Context) -> Weigh:
        steps: int = self.state["steps"]
        context.propose(self, steps=steps + 1)
        value = self.at(steps)
        for module in () if context.model is None else context.model.modules():
            if isinstance(module, HistogramDivergence):
                module.begin_step()

        def weigh(gradients: Gradients) -> Gradients:
            context.require(self, TASK, DIVERGENCE)
            if DIVERGENCE not in gradients.names:
                return gradients
            if value == 0:
                return gradients.observe(DIVERGENCE)
            factors = torch.ones_like(gradients.weights)
            factors.select(0, gradients.index(DIVERGENCE)).fill_(value)
            return gradients.reweighted(factors)

        return weigh
