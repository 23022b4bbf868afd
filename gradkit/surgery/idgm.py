"""Inter-domain gradient matching by finite differences."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_number
from gradkit.core.combine import combine
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform


@dataclass(eq=False)
class IDGM(Transform):
    """Maximise the inner products of the domains' gradients (IDGM, ICLR 2022).

    From [Gradient Matching for Domain Generalization](https://arxiv.org/abs/2104.09937), with one
    objective for each of the S domains, the gradient of

        L = (1/S)·Σ_i L_i − γ·(2/(S(S − 1)))·Σ_{i<j} ⟨∇L_i, ∇L_j⟩

    The paper writes the sum over i ≠ j. Here it is over unordered pairs, so that γ is the weight of
    the mean product, and two domains give −γ·⟨∇L_1, ∇L_2⟩. With H_i the Hessian of L_i and v_i the
    sum of the other domains' gradients,

        ∇L = (1/S)·Σ_i (∇L_i − (2γ/(S − 1))·H_i·v_i)

    The terms of the sum are the rows and 1/S is their weight: row i is the gradient of all terms
    with L_i, where the other domains' gradients are held fixed. Weights set by an inner transform
    multiply losses and gradients, and count as constants.

    The Hessian-vector products are central differences:

        H_i·v ≈ (‖v‖/(2ε))·(∇L_i(θ + ε·v/‖v‖) − ∇L_i(θ − ε·v/‖v‖))

    Their error is about ε²·‖v‖/6 times the third derivative of ∇L_i along v/‖v‖, plus the
    rounding error of the gradients times ‖v‖/ε. The default balances the two for the parameters'
    dtype: in small tanh, GELU and batch-norm networks at initialisation, the relative error is
    about 1e-4 in float32 and 1e-9 in float64 (1e-2 and 1e-8 with weights five times as large).

    Three conditions are needed. Losses must be the same functions at both points: with dropout pass
    `replay_rng=True` to `wrap`. They should be smooth: a kink between the two points counts as
    curvature, which autograd's second derivatives ignore; in ReLU networks the two can differ by
    more than the product itself. Gradients must be accurate: under autocast to bfloat16 or float16
    the difference is mostly rounding error, and parameters of these dtypes are refused.

    Domains are the objectives of nonzero weight. With a single domain there is no pair, and its
    gradient is returned unchanged; so are the gradients of observers.

    Not homogeneous: the products are of degree 2 in the losses. Cost: three gradients of each
    domain; a closure that returns all losses runs 2S + 1 times. Memory: one more set of rows and
    up to four flat vectors. State: none.

    Args:
        gamma: γ, the weight of the mean inner product; if negative, it drives gradients apart. The
            default is a starting point: to first order, that of `Fish` for five domains.
        epsilon: ε > 0, the distance from θ at which gradients are evaluated. None is the cube root
            of the dtype's machine epsilon: 4.9e-3 in float32, 6.1e-6 in float64.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is outside its range; in `step`, if the transform follows one
            that sets the update, or if parameters are in half precision.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.IDGM(gamma=0.1))
        >>> _ = optimizer.step(
        ...     {"a": lambda: (w**2).sum(), "b": lambda: ((w - 3) ** 2 / 2).sum()}
        ... )
        >>> w.grad  # (2 - 2)/2 - 0.1 * (2 * -2 + 1 * 2), rounded
        tensor([0.2000], dtype=torch.float64)
    """

    gamma: float = 0.01
    epsilon: float | None = None
    needs_several = True

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma)
        if self.epsilon is None:
            return
        check_number("epsilon", self.epsilon)
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; pass a positive distance, or None")

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            self._check_precision(context)
            here = inner(at, only)
            if here.has_update:
                raise ValueError(
                    f"{self!r} cannot follow a transform that has set the update, which has no "
                    "derivatives objective by objective; put it first in wrap()"
                )
            active = here.active
            if len(active) < 2:
                return here
            rows, _ = context.pool.take(len(here.names))
            rows.copy_(here.rows)
            for i in active:
                others = [j for j in active if j != i]
                v = combine(here.rows, here.weights, others, context.pool.take_vector())
                product = self._curvature(here.names[i], v, at, inner, context)
                rows[i].sub_(product.mul_(2 * self.gamma / (len(active) - 1)))
            made = here.replace(rows=rows, weights=here.weights / len(active))
            # These rows are not checked as an evaluation, so an overflow must show in the weights.
            finite = made.gram().diagonal()[list(active)].isfinite().all()
            return made.replace(weights=torch.where(finite, made.weights, torch.nan))

        return oracle

    def _curvature(
        self,
        name: str,
        v: Float[Tensor, " P"],
        at: Point | None,
        inner: Oracle,
        context: Context,
    ) -> Float[Tensor, " P"]:
        """The Hessian of an objective times v, written to v."""
        epsilon = self.epsilon or float(torch.finfo(context.layout.dtype).eps ** (1 / 3))
        norm = context.norm(v)
        factor = torch.where(norm > 0, epsilon / norm, torch.zeros_like(norm))
        ahead = inner(context.displaced(at, v, factor), (name,))
        behind = inner(context.displaced(at, v, -factor), (name,))
        torch.sub(ahead.rows[ahead.index(name)], behind.rows[behind.index(name)], out=v)
        return v.mul_(norm / (2 * epsilon))

    def _check_precision(self, context: Context) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            if context.layout.has(dtype):
                raise ValueError(
                    f"{self!r} takes differences of gradients, which {dtype} cannot resolve; keep "
                    "the parameters in float32 or float64"
                )
