"""A main gradient that does not act against auxiliary ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkit.core.flat import Scope
from gradkit.surgery.cosine_gate import check_main
from gradkit.surgery.host import numpy_or_torch, products_of
from gradkit.surgery.inputs import RuleInputs
from gradkit.surgery.memory import Remembered, Weighed
from gradkit.surgery.rule import GramRule, check_scope
from gradkit.surgery.spectrum import narrowed, reciprocal, widened


@dataclass(eq=False)
class GSMorph(GramRule):
    """Layer-wise gradient surgery ([Dou et al., MICCAI 2023](https://arxiv.org/abs/2306.14687)).

    Made for registration, where the main objective is the images' similarity and the auxiliary one
    the smoothness of the deformation, so that neither needs a weight. In each parameter tensor:

        d = g_main
        if ⟨d, g_aux⟩ < 0:   d ← d − (⟨d, g_aux⟩ / ‖g_aux‖²)·g_aux

    The auxiliary gradient is never added: where the two agree, the main one stands alone. This is
    the rule of the authors' code. Paper and code have one auxiliary objective; of several each is
    projected off in turn, in their order, from what the ones before have left (as PCGrad does for
    one gradient), so that only the last is sure to be in no conflict with d.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        main: The main objective, by name or position; a position counts those that take part in a
            step, so give the name where some may be absent.
        scope: What inner products are taken over: each "tensor" (the paper), each "group",
            "global", all parameters, or those that are "shared" by objectives.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> gk.GSMorph(scope="global")(jacobian)  # g_1 + 22/38 * g_2
        tensor([-0.5263,  1.5789,  1.5789])
        >>> gk.GSMorph(scope="global")(jacobian.abs())
        tensor([4., 1., 1.])
    """

    main: str | int = 0
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        check_main(self.main)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        main = inputs.index(self.main)
        weights = torch.zeros_like(wide[..., 0])
        weights[..., main] = 1
        inverses = reciprocal(wide.diagonal(dim1=-2, dim2=-1))
        with numpy_or_torch(weights, wide, inverses) as (_, (numbers, products, scales)):
            for j in range(gram.shape[-1]):
                if j != main:
                    product = products_of(products[..., j, :], numbers)
                    numbers[..., j] -= product * (product < 0) * scales[..., j]
        return narrowed(weights, finite, gram), memory
