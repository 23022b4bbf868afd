"""Meta-learning for domain generalization: train on some domains, test on another."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import torch

from gradkit.core.arguments import check_number, own_generator
from gradkit.core.combine import combine
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.core.transform import Transform
from gradkit.surgery.visit_order import LazySelection, VisitOrder


@dataclass(eq=False)
class MLDG(Transform):
    """Train on some domains such that a step helps another domain (MLDG, AAAI 2018).

    From [Learning to Generalize: Meta-Learning for Domain
    Generalization](https://arxiv.org/abs/1710.03463), Algorithm 1, to first order, with one
    objective for each of the S domains:

        draw the meta-test domain j
        ḡ = mean of ∇L_i(θ) over the S − 1 others
        g = ∇L_j(θ − α·ḡ)
        d = ḡ + β·g

    The paper also differentiates through the inner step, which adds −α·β·H·g with H the Hessian of
    the others' mean loss. DomainBed's code omits this term, too. It differs otherwise: it pairs
    single meta-train and meta-test domains, makes inner steps with Adam, and divides by S.

    The rows of the meta-train domains have the weight 1/(S − 1), that of the meta-test domain has
    the weight β. Weights that an inner transform has set are multiplied by these, and the inner
    step uses weighted gradients. Observers take no part: they are never drawn, and are evaluated at
    θ.

    Not homogeneous: the inner step scales with the gradients. Cost: one gradient of each domain; a
    closure that returns all losses runs twice. If an inner transform makes the drawn objective an
    observer, each domain costs one more gradient. Memory: one more set of rows and two flat
    vectors. State: the generator.

    Args:
        alpha: α ≥ 0, the step size of the inner step. The default is a starting point, not the
            paper's.
        beta: β, the weight of the meta-test gradient.
        test: The objective that is the meta-test domain of every step; None draws one each step.
        generator: A CPU generator for the draw; by default a new one with seed 0, the same in every
            process.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is outside its range, or the generator is not on the CPU; in `step`,
            if there are not two objectives of nonzero weight, or if `test` is an observer.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> base = torch.optim.SGD([w], lr=1.0)
        >>> optimizer = gk.wrap(base, gk.MLDG(alpha=0.1, beta=0.5, test="b"))
        >>> _ = optimizer.step(
        ...     {"a": lambda: (w**2 / 2).sum(), "b": lambda: ((w - 3) ** 2 / 2).sum()}
        ... )
        >>> w.data  # 1 - (1 + 0.5 * (0.9 - 3))
        tensor([1.0500])
    """

    alpha: float = 0.01
    beta: float = 1.0
    test: str | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    divides = True
    needs_several = True

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, least=0)
        check_number("beta", self.beta)
        if self.test is not None and not isinstance(self.test, str):
            raise TypeError(f"test is {self.test!r}; pass the name of an objective, or None")
        self.generator = own_generator(self.generator)

    def around(self, inner: Oracle, context: Context) -> Oracle:
        visits = VisitOrder(context, self.generator if self.test is None else None)

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            def test() -> str | None:
                if self.test is not None:
                    return self.test
                left = (name for name in visits.order(only) if name not in visits.observers)
                return next(left, None)

            self._require_test(context)
            here = inner(at, LazySelection(lambda n: n != test() and (only is None or n in only)))
            self._require_test(context)
            j = test()
            train = [k for k in here.active if here.names[k] != j]
            if j is None or not train:
                raise ValueError(
                    f"{self!r} trains on some objectives and tests on another, so it needs two "
                    f"of nonzero weight among {', '.join(map(repr, visits.order(only)))}; pass "
                    "step() one for each domain"
                )
            sources, last = dict.fromkeys(here.names, here), here
            if only is None or j in only:
                weights = here.weights / len(train)
                mean = combine(here.rows, weights, train, context.pool.take_vector())
                last = inner(context.displaced(at, mean, -self.alpha), (j,))
                if not visits.is_active(j, last):
                    self._check_drawn(j)
                    return oracle(at, only)  # with the next in the order
                sources[j] = last
            joined = context.join(sources, last)
            weights = joined.weights / len(train)
            if j in joined.names:
                k = joined.index(j)
                weights[k] = self.beta * joined.weights[k]
            return joined.replace(weights=weights)

        return oracle

    def _require_test(self, context: Context) -> None:
        if self.test is not None:
            context.require(self, self.test)

    def _check_drawn(self, test: str) -> None:
        if self.test is not None:
            raise ValueError(
                f"{self!r} cannot test on {test!r}, which a transform before it has made an "
                "observer of weight 0; name another objective, or put MLDG first in wrap()"
            )
