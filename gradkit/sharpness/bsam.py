"""SAM as a form of variational Bayes."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_count, check_number, own_generator
from gradkit.core.blocks import in_blocks, with_zeros
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.flat import Layout
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.storage import Parts
from gradkit.core.transform import Transform


@dataclass(eq=False)
class BSAM(Transform):
    """Bayesian SAM ([Möllenhoff & Khan, ICLR 2023](https://arxiv.org/abs/2210.01620)).

        g = ∇L(w + n),   n ~ N(0, 1/(N·s))
        g_s = ∇L(w + ρ·g/s)
        m ← β₁·m + (1 − β₁)·(g_s + δ·w)                   m = 0 at first
        step on m/s
        s ← β₂·s + (1 − β₂)·(√s·|g| + damping + δ)        s = 1 at first

    all elementwise, with s as it was before. The base optimizer is `SGD(lr)` without momentum and
    weight decay, which the rule has by itself. The authors draw eight perturbations for each batch,
    of which this takes one, and take N as four times the number of images, for augmentation.

    Cost: two gradients of each objective. Memory: six flat vectors, state included. State: m and
    s, two flat vectors; the generator.

    Args:
        num_data: N, the number of training examples.
        rho: ρ ≥ 0, the radius in units of g/s.
        beta_1: β₁ in [0, 1).
        beta_2: β₂ in [0, 1).
        damping: ≥ 0, what is added to s beside the prior's precision.
        delta: δ ≥ 0, the prior's precision; None is 40/N.
        generator: A CPU generator for the noise; by default one of its own with seed 0, the same
            in every process.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> base = torch.optim.SGD([w], lr=0.5)
        >>> optimizer = gk.wrap(base, gk.BSAM(num_data=10**12, rho=0.5, delta=0.0))
        >>> _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.data  # s = 1, hardly any noise: w - 0.5 * 0.1 * 1.5 * w
        tensor([0.9250, 1.8500])
    """

    num_data: int
    rho: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.999
    damping: float = 0.1
    delta: float | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    needs_rows = False
    replaces_step = True
    sets_update = True

    def __post_init__(self) -> None:
        check_count("num_data", self.num_data)
        check_number("rho", self.rho, least=0)
        check_number("beta_1", self.beta_1, least=0, below=1)
        check_number("beta_2", self.beta_2, least=0, below=1)
        check_number("damping", self.damping, least=0)
        if self.delta is not None:
            check_number("delta", self.delta, least=0)
        self.generator = own_generator(self.generator)

    def initial_vectors(self, layout: Layout) -> dict[str, Tensor]:
        return {"momentum": layout.zeros(), "scale": layout.zeros() + 1}

    def around(self, inner: Oracle, context: Context) -> Oracle:
        self._check_base(context)
        assert self.generator is not None
        e = context.noise(self.generator)
        m = self.vectors["momentum"]
        for part, scale in in_blocks(context.layout, e, self.vectors["scale"]):
            part.mul_(torch.mul(scale, self.num_data).rsqrt_())
        delta = 40 / self.num_data if self.delta is None else self.delta

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            g = inner(context.displaced(at, e), only).stored().vector
            is_first = not context.proposed(self)  # later evaluations are at displaced weights
            if is_first:
                context.propose(self, scale=self._next_scale(g, delta, context))
            point = context.displaced(at, self._divided(g, context), self.rho)
            del g  # before there is another gradient
            above = inner(point, only)
            del point  # before there are more vectors
            share = 1 - self.beta_1
            new = context.sum_of(
                (m, self.beta_1),
                (above.stored().vector, share),
                (context.weight_parts(at), share * delta),
            )
            if is_first:
                context.propose(self, momentum=new)
            return above.with_update(self._divided(new, context))

        return oracle

    def _next_scale(
        self, g: Float[Tensor, " P"] | Parts, delta: float, context: Context
    ) -> Float[Tensor, " P"]:
        """The new s."""
        layout, result = context.layout, context.pool.take_vector()
        parts = with_zeros(layout, g)
        for part, s, out in in_blocks(layout, parts, self.vectors["scale"], result):
            torch.sqrt(s, out=out).mul_(part.abs()).add_(self.damping + delta)
            torch.lerp(s, out, 1 - self.beta_2, out=out)
        return result

    def _divided(
        self, vector: Float[Tensor, " P"] | Parts, context: Context
    ) -> Float[Tensor, " P"]:
        """A vector divided by s, in memory of the pool."""
        result = context.pool.take_vector()
        parts = with_zeros(context.layout, vector)
        for part, s, out in in_blocks(context.layout, parts, self.vectors["scale"], result):
            torch.div(part, s, out=out)
        return result

    def _check_base(self, context: Context) -> None:
        for group in context.base.param_groups:
            others = [key for key in ("momentum", "weight_decay") if group.get(key)]
            if not isinstance(context.base, torch.optim.SGD) or others:
                what = f" with {others[0]}" if others else ""
                raise ValueError(
                    f"{self!r} has a momentum and a prior of its own, and the base optimizer is "
                    f"{type(context.base).__name__}{what}; use torch.optim.SGD(lr=...) alone"
                )
