"""First-order gradient matching by sequential steps on the domains."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch

from gradkit.core.arguments import check_number, own_generator
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform
from gradkit.surgery.visit_order import LazySelection, VisitOrder


@dataclass(eq=False)
class Fish(Transform):
    """Compute each domain's gradient after steps on the domains before it (Fish, ICLR 2022).

    From [Gradient Matching for Domain Generalization](https://arxiv.org/abs/2104.09937),
    Algorithm 1, with one objective for each domain:

        θ̃ ← θ
        for domain i in random order:
            g̃_i = ∇L_i(θ̃)
            θ̃ ← θ̃ − α·g̃_i
        θ ← θ + ε·(θ̃ − θ)

    Since θ − θ̃ = α·Σ g̃_i, the last line is gradient descent along d = Σ g̃_i. This transform
    returns the rows g̃_i, so d is the direction and has the scale of a sum of gradients for every
    α. With the base `SGD(lr=ε·α)` it is exactly Algorithm 1. The authors' code divides ε by the
    number S of domains that a step visits, which is `SGD(lr=ε·α/S)`. Its inner steps use Adam or
    momentum, with a state that is kept from step to step; here they are plain, as in the paper.

    In the mean over all orders, d is to first order in α the gradient of
    Σ L_i − (α/2)·Σ_{i<j} ⟨∇L_i, ∇L_j⟩: S times that of `IDGM(gamma=α·(S − 1)/4)`.

    Domains are the objectives of nonzero weight; a weighted domain steps along its weighted
    gradient. Observers are evaluated at θ. The losses that `step` sums are those at the points
    where the domains are visited; losses that one closure returns together are all from θ.

    Not homogeneous: the steps scale with the gradients. Cost: one gradient of each domain, each at
    its own point, so that a closure that returns all losses runs once for each domain. Objectives
    that an inner transform makes observers may cost one more gradient. Memory: one more set of rows
    and two flat vectors. State: the generator.

    Args:
        inner_lr: α, the step size of a domain's inner step. 0 computes all gradients at θ. In the
            authors' code it is the inner optimizer's learning rate (Adam's for most data, 2e-6 to
            1e-3); this default is a starting point for plain gradients.
        shuffle: Whether to draw the domains' order at each step, as the paper does; otherwise the
            objectives' own order is used.
        generator: A CPU generator for the order; by default a new one with seed 0, the same in
            every process.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `inner_lr` is negative or not finite, or the generator is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> alpha, epsilon = 0.1, 0.5
        >>> base = torch.optim.SGD([w], lr=epsilon * alpha)
        >>> optimizer = gk.wrap(base, gk.Fish(inner_lr=alpha, shuffle=False))
        >>> _ = optimizer.step(
        ...     {"a": lambda: (w**2 / 2).sum(), "b": lambda: ((w - 3) ** 2 / 2).sum()}
        ... )
        >>> w.data  # 1 → 0.9 → 1.11 inside; half of the way there
        tensor([1.0550])
    """

    inner_lr: float = 0.01
    shuffle: bool = True
    generator: torch.Generator | None = field(default=None, repr=False)

    divides = True
    needs_several = True

    def __post_init__(self) -> None:
        check_number("inner_lr", self.inner_lr, least=0)
        self.generator = own_generator(self.generator)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        visits = VisitOrder(context, self.generator if self.shuffle else None)

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            # The objectives' names may be known only after a closure has run.
            first = inner(at, LazySelection(lambda name: name in visits.order(only)[:1]))
            names = visits.order(only)
            if len(names) < 2:
                return first
            sources: dict[str, Gradients] = {}
            last = first
            point: Point | None = at
            for name in names:
                start = at if name in visits.observers else point
                part = inner(start, (name,)) if sources else first
                if visits.is_active(name, part):
                    last = part
                    if name != names[-1]:
                        factor = -self.inner_lr * part.weights[part.index(name)]
                        moved = context.displaced(point, part.row(name), factor)
                        # Computed now, since further steps are added to it.
                        point = moved.flat(context.pool.take_vector())
                elif start is not at:
                    part = inner(at, (name,))
                sources[name] = part
            return context.join(sources, last)

        return oracle
