"""Momentum-SAM."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.oracle import Oracle
from gradkit.sharpness.ascent import Ascent, Radius, check_one_step, check_synchronised


@dataclass(eq=False, repr=False)
class MSAM(Ascent):
    """Momentum-SAM ([Becker et al., 2024](https://arxiv.org/abs/2401.12033)).

        v the base optimizer's momentum
        step on ∇L(w − ρ·v/(‖v‖ + 1e-12))

    The base's own momentum, SGD's "momentum_buffer" or Adam's "exp_avg", shows the way uphill, so
    that no further gradient is needed. In the authors' code weights stay displaced between steps,
    and evaluating the model takes a move back; here they are restored. The first step, which has no
    momentum yet, is plain. Weight decay is the base's, at the weights; the authors' SGD takes it
    at the displaced ones, and their AdamW after the step.

    Cost: one gradient of each objective. Memory: one flat vector. State: none but the base's.

    Args:
        rho: ρ ≥ 0; the authors take 0.3 with SGD, 1 with AdamW, 3 on CIFAR and 10 for a ViT.
        only: Which parameters are displaced; see `Ascent`.
        adaptive: Whether the ascent is scaled by the weights; see `Ascent`.
        eta: η ≥ 0, with `adaptive`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> base = torch.optim.SGD([w], lr=0.0, momentum=0.9)
        >>> optimizer = gk.wrap(base, gk.MSAM(rho=0.5))
        >>> for _ in range(2):
        ...     _ = optimizer.step(lambda: w.square().sum() / 2)
        >>> w.grad  # w - 0.5 * w / 5
        tensor([2.7000, 3.6000])
    """

    rho: Radius = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_step(self)
        check_synchronised(self, "the momentum is that of all ranks")

    def around(self, inner: Oracle, context: Context) -> Oracle:
        momentum = context.base_state("momentum_buffer")
        if all(part is None for part in momentum):
            momentum = context.base_state("exp_avg")
        if all(part is None for part in momentum):
            self._check_base(context)
            return inner

        def oracle(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            return inner(context.point(at) - self.rise_along(momentum, at, context), only)

        return oracle

    def _check_base(self, context: Context) -> None:
        """Check that there will be a momentum once the base has stepped."""
        stepped = any(context.base.state.get(each) for each in context.layout.parameters)
        plain = [group.get("momentum") == 0 for group in context.base.param_groups]
        if stepped or all(plain):
            raise ValueError(
                f"{self!r} goes along the base optimizer's momentum, and "
                f"{type(context.base).__name__} keeps none ('momentum_buffer' or 'exp_avg'); use "
                "SGD with momentum > 0, or Adam"
            )
