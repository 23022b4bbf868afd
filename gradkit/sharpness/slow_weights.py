"""Slow weights that follow fast ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradkit.core.arguments import check_count, check_number
from gradkit.core.context import Context
from gradkit.core.flat import Layout
from gradkit.core.transform import Transform


@dataclass(eq=False)
class SlowWeights(Transform):
    """The Lookahead optimizer ([Zhang et al., NeurIPS 2019](https://arxiv.org/abs/1907.08610)).

        every k-th step, once the base has stepped to w:   φ ← φ + α·(w − φ),   w ← φ

    φ starts as the weights before the first step. (`gk.LookAhead` is another method.) The base's
    momentum stays as it is, as in the authors' default.

    Cost: none beyond the gradients. Memory: two flat vectors, state included. State: φ, one flat
    vector; the number of steps.

    Args:
        k: Every how many steps the slow weights move.
        alpha: α in (0, 1], how far.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.5), gk.SlowWeights(k=2, alpha=0.5))
        >>> for _ in range(2):
        ...     _ = optimizer.step(lambda: w.sum())
        ...     print(w.item())  # 1 - 0.5, then half of the way from 1 to 0
        0.5
        0.5
    """

    k: int = 5
    alpha: float = 0.5
    needs_rows = False

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_number("alpha", self.alpha, above=0, most=1)
        self.state["steps"] = 0

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return {"slow": layout.flatten(layout.local_parameters())}

    def after_step(self, context: Context) -> None:
        self.state["steps"] += 1
        if self.state["steps"] % self.k == 0:
            slow = self.vectors["slow"]
            context.set_weights(slow.lerp_(context.weights(), self.alpha))
