"""Weights that are averaged over steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.mgda import MGDA
from gradkit.surgery.rule import GramRule

_INNER = "rule."


@dataclass(eq=False)
class CRMOGM(GramRule):
    """Correlation-reduced multi-objective gradient manipulation ([Zhou et al., NeurIPS 2022](https://openreview.net/forum?id=ScwfQ7hdwyP)).

        λ_t = α·λ_{t−1} + (1 − α)·λ̂_t,   λ_0 = λ̂_1        d = Σ λ_t,i g_i

    where λ̂ are another rule's weights. A rule's weights and the gradients that it weights come from
    the same batch. The averaged weights depend less on this batch, as the paper's proof of
    convergence requires.

    Homogeneous of degree 1 if the inner rule is. Cost: none beyond the gradients. State: λ, and the
    inner rule's own.

    Args:
        rule: The inner rule, whose weights are averaged; MGDA by default. Its scope is this rule's
            scope.
        alpha: α in [0, 1]: 0 is the inner rule itself, 1 keeps its first weights.

    Raises:
        TypeError: If `rule` is not a `GramRule`, or `alpha` is not a number.
        ValueError: If `alpha` is not between 0 and 1.

    Examples:
        >>> import torch, gradkit as gk
        >>> rule = gk.CRMOGM(gk.MGDA(), alpha=0.5)
        >>> rule.weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.6000, 0.4000])
        >>> rule.weights(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5500, 0.4500])
    """

    rule: GramRule = field(default_factory=MGDA)
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.rule, GramRule):
            raise TypeError(
                f"rule is a {type(self.rule).__name__}; pass a rule by Gram matrix, such as "
                "gk.MGDA()"
            )
        check_number("alpha", self.alpha, least=0, most=1)
        self.scope = self.rule.scope
        self.generator = self.rule.generator
        self.needs_symmetry = self.rule.needs_symmetry
        self.degree = self.rule.degree if self.rule.degree == 1 else None

    @property
    def needs_losses(self) -> bool:
        """Whether the inner rule needs losses."""
        return self.rule.needs_losses

    def draw(self, count: int) -> Any:
        return self.rule.draw(count)

    def init(self, count: int) -> dict[str, Tensor]:
        inner = self.rule.init(count)
        return {
            "weights": torch.zeros(count),
            "seen": torch.zeros(count),
            **{_INNER + key: value for key, value in inner.items()},
        }

    def solves(self, count: int) -> bool:
        return self.rule.solves(count)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        of_rule = {
            key.removeprefix(_INNER): value
            for key, value in memory.items()
            if key.startswith(_INNER)
        }
        new, learnt = self.rule.checked_weights(inputs, of_rule)
        seen = memory["seen"]
        weights = torch.where(seen > 0, torch.lerp(new, memory["weights"], self.alpha), new)
        return weights, {
            "weights": weights,
            "seen": torch.ones_like(seen),
            **{_INNER + key: value for key, value in learnt.items()},
        }
