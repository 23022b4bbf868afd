"""A main gradient that does not act against auxiliary ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkit.core.flat import Scope
from gradkit.surgery.cosine_gate import check_main
from gradkit.surgery.host import numpy_or_torch, products_of
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.spectrum import narrowed, reciprocal, widened


@dataclass(eq=False)
class GSMorph(GramRule):
    """Layer-wise gradient surgery ([Dou et al., MICCAI 2023](https://arxiv.org/abs/2306.14687)).

    Designed for image registration, where the main objective is the images' similarity and the
    auxiliary one the smoothness of the deformation; neither needs a weight. In each parameter
    tensor:

        d = g_main
        if ⟨d, g_aux⟩ < 0:   d ← d − (⟨d, g_aux⟩ / ‖g_aux‖²)·g_aux

    The auxiliary gradient is never added: if the two agree, d is the main gradient. This is the
    rule of the authors' code. Paper and code have one auxiliary objective. Several are projected
    off one after the other, in their order (as PCGrad does for one gradient), so that only the last
    one is guaranteed not to conflict with d.

    With scope "global" and the loss on stored samples of earlier tasks as the auxiliary one, this
    is A-GEM ([Chaudhry et al., ICLR 2019](https://arxiv.org/abs/1812.00420)).

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        main: The main objective, by name or position. A position counts only objectives that take
            part in a step, so give the name if some may be absent.
        scope: The parameters over which inner products are computed: each "tensor" (the paper),
            each "group", all ("global"), or those "shared" by objectives.

    Raises:
        TypeError: If `main` is not a name or position.
        ValueError: If `scope` has no valid value.

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
