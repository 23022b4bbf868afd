"""Gradients moved towards the average cosine of each pair."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradkit.core.arguments import check_number, own_generator
from gradkit.core.flat import Scope
from gradkit.core.gram import cosines
from gradkit.surgery.host import numpy_or_torch, products_of, random_orders, rows_of, uploaded
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.spectrum import gradient_norms, narrowed, widened

# Cosines of float32 gradients that are nearer to 1 than this cannot be distinguished.
_LARGEST_TARGET = 1 - 1e-8
# A squared norm this small, relative to those of the summed vectors, is rounding error.
_CANCELLED = 1e-14


@dataclass(eq=False)
class GradVac(GramRule):
    """Gradient Vaccine ([Wang et al., ICLR 2021](https://arxiv.org/abs/2010.05874)).

    PCGrad acts on negative cosines. This rule acts on cosines below a target, which is a moving
    average of the pair's cosine. For each objective i:

        g'_i = g_i
        for j ≠ i in random order:
            φ = cos(g'_i, g_j)
            if φ < φ̂_ij:   g'_i ← g'_i + w·g_j,   after which cos(g'_i, g_j) = φ̂_ij:
                w = ‖g'_i‖·(φ̂_ij·√(1−φ²) − φ·√(1−φ̂_ij²)) / (‖g_j‖·√(1−φ̂_ij²))
            φ̂_ij ← (1−β)·φ̂_ij + β·φ
        d = Σ_i g'_i

    The targets φ̂ start at 0, for which the step is PCGrad's; with β = 0 they stay 0. They are not
    symmetric, since φ is measured on the present g'_i, after earlier corrections. Targets move
    after every visit, also those of pairs that are not corrected, as in LibMTL's code.

    A zero gradient (or a g'_i that has vanished) has cosine 0 with all others and is not corrected.
    Targets are limited to 1 − 1e-8, since w grows without bound near 1.

    Homogeneous of degree 1, for fixed targets. Cost: none beyond the gradients. State: the
    generator and φ̂, K² elements (for each block, with another scope than "global").

    Args:
        beta: β in [0, 1], how fast targets move. 0.5 is the default of LibMTL and TorchJD; smaller
            values, such as 0.01, are also used.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives. Each block has its own targets.
        generator: A CPU generator for the order; by default a new one with seed 0, the same in
            every process.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value, or the generator is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> rule = gk.GradVac()
        >>> rule(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.5848, 3.8012, 3.8012])
        >>> round(rule.state["targets"][0, 1].item(), 4)  # half the cosine
        -0.4206
    """

    beta: float = 0.5
    scope: Scope = "global"
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_number("beta", self.beta, least=0, most=1)
        self.generator = own_generator(self.generator)

    def draw(self, count: int) -> Int[Tensor, "K K"] | None:
        """For each objective, the order in which the others are visited."""
        return random_orders(count, self.generator) if count > 2 else None

    def init(self, count: int) -> dict[str, Tensor]:
        """The initial targets φ̂, all 0."""
        return {"targets": torch.zeros(count, count)}

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        old = memory["targets"].to(wide)
        weights, new = gradvac_weights(wide, old, self.beta, inputs.draws)
        learnt = {"targets": torch.where(finite[..., None], new, old)}
        return narrowed(weights, finite, gram), learnt


def gradvac_weights(
    gram: Float[Tensor, "*batch K K"],
    targets: Float[Tensor, "*batch K K"],
    beta: float,
    order: Int[Tensor, "K K"] | None = None,
) -> tuple[Float[Tensor, "*batch K"], Float[Tensor, "*batch K K"]]:
    """GradVac's weights, d = weights @ rows, and the new targets.

    Args:
        gram: Gram matrices of the gradients, finite.
        targets: φ̂; row i holds those of objective i.
        beta: How fast targets move.
        order: Row i holds the order in which objective i visits the others (its own number is
            skipped); needed for K > 2.

    Raises:
        ValueError: If there are more than two objectives and no order.

    Examples:
        >>> gram = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> weights, targets = gradvac_weights(gram, torch.full((2, 2), 0.6), 0.5)
        >>> weights  # 1 + 2 * 0.6 / 0.8 and 1 + 0.5 * 0.6 / 0.8
        tensor([2.5000, 1.3750])
        >>> targets
        tensor([[0.6000, 0.3000],
                [0.3000, 0.6000]])
    """
    count = gram.shape[-1]
    if order is None:
        if count > 2:
            raise ValueError(f"with {count} objectives the result depends on their order; pass it")
        order = torch.arange(count, device=gram.device).expand(count, count)
    norms, each = gradient_norms(gram), torch.arange(count, device=gram.device)
    visited = uploaded(order, gram, order.dtype).T  # [visit, objective], like all indexed by it
    # Row i of `parts` expresses g'_i/‖g_i‖ in the directions of the original gradients.
    parts = torch.eye(count, dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
    targets = targets.clone()
    with numpy_or_torch(parts, targets, cosines(gram), norms, visited, each) as (module, arrays):
        _visit(module, beta, *arrays)
    sums = (norms[..., None] * parts).sum(-2)
    return torch.where(norms > 0, sums / norms, torch.ones_like(norms)), targets


def _visit(
    module: Any,
    beta: float,
    parts: Any,
    targets: Any,
    cosines: Any,
    norms: Any,
    visited: Any,
    each: Any,
) -> None:
    """Run GradVac's loop for all objectives at once, changing `parts` and `targets` in place."""
    target, other = targets[..., each, visited], visited != each
    aims = module.clip(target, None, _LARGEST_TARGET)
    cotangents = aims / module.sqrt(1 - aims * aims)
    # The objective's own gradient is never added, nor is a zero gradient.
    aims = module.where(other & (norms[..., visited] > 0), aims, -math.inf)
    found = module.empty_like(aims)
    products = 1.0 * cosines  # of each g'_i with each direction
    memory = module.empty_like(cosines)
    spans = products[..., each, each]  # Σ|part|, the norm if all parts had the same direction
    for visit, others in enumerate(visited):
        squares = products_of(parts, products)
        own = module.sqrt(module.where(squares > _CANCELLED * spans * spans, squares, 0.0))
        cosine = module.where(own > 0, products[..., each, others] / own, 0.0)
        cosine = module.clip(cosine, -1, 1)
        turn = cotangents[..., visit, :] * module.sqrt(1 - cosine * cosine) - cosine
        step = module.where(cosine < aims[..., visit, :], own * turn, 0.0)
        parts[..., each, others] += step
        theirs = rows_of(cosines, others, memory)
        theirs *= step[..., None]
        products += theirs
        spans += abs(step)
        found[..., visit, :] = cosine
    targets[..., each, visited] = module.where(other, (1 - beta) * target + beta * found, target)
