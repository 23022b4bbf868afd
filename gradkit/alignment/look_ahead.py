"""Look-ahead gradients: one objective's gradient after a step along another's."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gradkit.core.arguments import check_number
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle, Selection
from gradkit.core.transform import Transform


@dataclass(eq=False)
class LookAhead(Transform):
    """Compute one objective's gradient after a step along another's (GraTa, AAAI 2025).

    From [Gradient Alignment Improves Test-Time Adaptation for Medical Image
    Segmentation](https://arxiv.org/abs/2408.07343), Algorithm 1, lines 1–3:

        g_a = ∇L_auxiliary(θ)
        θ'  = θ − s·g_a
        g   = ∇L_pseudo(θ')

    To first order g is the gradient of L_pseudo − s·⟨∇L_pseudo, ∇L_auxiliary⟩ without the term with
    the auxiliary Hessian: it favours weights where the two gradients agree. The step size s is not
    the learning rate; the paper and its code use 1.

    Other objectives are evaluated at θ and keep their weights. The auxiliary row is an observer, of
    weight 0.

    Cost: one gradient of each objective. Memory: one flat vector for the point and one more set
    of rows. State: none.

    Args:
        along: The objective along whose gradient the step is made.
        update: The objective whose gradient is computed after it.
        step_size: s, the step size.

    Raises:
        TypeError: If `step_size` is not a number.
        ValueError: If it is not finite, or if both objectives are the same; in `step`, if the step
            lacks one of them.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.5), gk.LookAhead())
        >>> _ = optimizer.step(
        ...     {"pseudo": lambda: (w**2 / 2).sum(), "auxiliary": lambda: (w / 4).sum()}
        ... )
        >>> w.data  # 1 - 0.5 * (1 - 1/4)
        tensor([0.6250])
    """

    along: str = "auxiliary"
    update: str = "pseudo"
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_number("step_size", self.step_size)
        if self.along == self.update:
            raise ValueError(
                f"along and update are both {self.along!r}; "
                "looking ahead along an objective's own gradient is SAM with rho < 0"
            )

    def left_out(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            context.require(self, self.along)
            here = inner(at, only)
            return here.observe(self.along) if self.along in here.names else here

        return oracle

    def around(self, inner: Oracle, context: Context) -> Oracle:
        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            context.require(self, self.along, self.update)
            here = inner(at, Selection(only, include=(self.along,), exclude=(self.update,)))
            context.require(self, self.along, self.update)
            here = here.observe(self.along)
            if only is not None and self.update not in only:
                return here
            row = here.row(self.along)
            there = inner(context.displaced(at, row, -self.step_size), (self.update,))
            # Inner transforms may have added further rows at either point.
            return context.join({**dict.fromkeys(here.names, here), self.update: there}, there)

        return oracle
