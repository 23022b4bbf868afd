"""Projection of conflicting gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import add, mul
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradkit.core.arguments import own_generator
from gradkit.core.flat import Scope
from gradkit.core.gram import accumulator
from gradkit.surgery.host import (
    numpy_or_torch,
    on_host,
    products_of,
    random_orders,
    rows_of,
    uploaded,
)
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule

_FEW = 8


@dataclass(eq=False)
class PCGrad(GramRule):
    """Project conflicting gradients ([Yu et al., NeurIPS 2020](https://arxiv.org/abs/2001.06782)).

    Algorithm 1, for each objective i:

        g'_i = g_i
        for j ≠ i in random order:
            if ⟨g'_i, g_j⟩ < 0:   g'_i ← g'_i − (⟨g'_i, g_j⟩ / ‖g_j‖²)·g_j
        d = Σ_i g'_i

    Only inner products are needed, so the whole algorithm runs on the Gram matrix, for all i at
    once. With two objectives the order does not matter and there is a closed form. The authors'
    code visits in the objectives' own order, since it drops what its shuffle returns.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: the generator.

    Args:
        reduction: "sum" (the paper) or "mean" of the g'_i.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.
        generator: A CPU generator for the order; by default a new one with seed 0, the same in
            every process.

    Raises:
        TypeError: If `generator` is not a generator.
        ValueError: If an argument has no valid value, or the generator is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.PCGrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.5848, 3.8012, 3.8012])
    """

    reduction: Literal["sum", "mean"] = "sum"
    scope: Scope = "global"
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is {self.reduction!r}; choose 'sum' or 'mean'")
        self.generator = own_generator(self.generator)

    def draw(self, count: int) -> Int[Tensor, "K K"] | None:
        """For each objective, the order in which the others are visited."""
        return random_orders(count, self.generator) if count > 2 else None

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        weights = pcgrad_weights(gram, inputs.draws)
        return weights / gram.shape[-1] if self.reduction == "mean" else weights, memory


def pcgrad_weights(
    gram: Float[Tensor, "*batch K K"], order: Int[Tensor, "K K"] | None = None
) -> Float[Tensor, "*batch K"]:
    """PCGrad's weights: d = weights @ rows.

    Args:
        gram: Gram matrices of the gradients.
        order: Row i holds the order in which objective i visits the others (its own number is
            skipped); needed for K > 2.

    Raises:
        ValueError: If there are more than two objectives and no order.

    Examples:
        >>> pcgrad_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([2.2222, 1.5789])
    """
    count = gram.shape[-1]
    if count == 1:
        return torch.ones_like(gram[..., 0])
    if count > 2 and order is None:
        raise ValueError(f"with {count} objectives the result depends on their order; pass it")
    wide = gram.to(accumulator(gram.device))
    if order is not None and on_host(gram) and gram.dim() == 2 and count <= _FEW:
        numbers = _project_few(wide.tolist(), order.tolist())
        return torch.tensor(numbers, dtype=gram.dtype, device="cpu")
    squares = wide.diagonal(dim1=-2, dim2=-1)
    # No gradient is projected off a zero gradient.
    squares = torch.where(squares == 0, torch.inf, squares)
    if order is None:
        return (1 - wide[..., 0, 1, None].clamp(max=0) / squares).to(gram.dtype)
    each = torch.arange(count, device=gram.device)
    visited = uploaded(order, gram, order.dtype).T  # [visit, objective]
    # Row i of `weights` expresses g'_i in the original gradients.
    weights = torch.eye(count, dtype=wide.dtype, device=gram.device).expand_as(wide).clone()
    with numpy_or_torch(weights, wide, squares, visited, each) as (module, arrays):
        _project(module, *arrays)
    return weights.sum(-2).to(gram.dtype)


# For few objectives plain Python is even faster. The two functions sum in different orders; their
# results agree to 1e-15 of the largest weight.


def _project(module: Any, weights: Any, gram: Any, squares: Any, visited: Any, each: Any) -> None:
    """Run PCGrad's loop for all objectives at once, in torch or numpy, changing `weights`."""
    memory = module.empty_like(gram)
    # No gradient is projected off itself.
    divisors = module.where(visited == each, math.inf, squares[..., visited])
    for visit, others in enumerate(visited):
        products = products_of(rows_of(gram, others, memory), weights)
        weights[..., each, others] -= products * (products < 0) / divisors[..., visit, :]


def _project_few(gram: list[list[float]], order: list[list[int]]) -> list[float]:
    """PCGrad's weights for one Gram matrix, one objective after the other."""
    total = [0.0] * len(gram)
    for i, visited in enumerate(order):
        weights = [float(j == i) for j in range(len(gram))]
        for j in visited:
            product = sum(map(mul, gram[j], weights))
            if j != i and gram[j][j] != 0 and not product >= 0:  # NaN must remain NaN
                weights[j] -= product / gram[j][j]
        total = list(map(add, total, weights))
    return total
