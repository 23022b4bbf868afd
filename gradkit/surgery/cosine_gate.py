"""Auxiliary gradients, weighted by their agreement with the main gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradkit.core.flat import Scope
from gradkit.core.gram import cosines
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.spectrum import narrowed, widened


@dataclass(eq=False)
class CosineGate(GramRule):
    """Gate auxiliary gradients by their cosine ([Du et al., 2018](https://arxiv.org/abs/1812.02224)).

    With m the main objective and a each of the others:

        weighted     d = g_m + Σ_a max(0, cos(g_m, g_a))·g_a
        unweighted   d = g_m + Σ_a [cos(g_m, g_a) ≥ 0]·g_a

    In both modes ⟨d, g_m⟩ ≥ ‖g_m‖². A zero gradient has cosine 0. The critical points of the
    weighted mode are therefore those of the main loss; in the unweighted mode all g_a pass where
    g_m is 0. The paper has one auxiliary loss; several are summed here.

    The paper computes the cosine over parameters that the tasks share, as scope "shared" does. The
    other scopes include heads, where only one of the gradients is nonzero. Heads make the cosine
    smaller, and are gated like other parameters; by "tensor", an auxiliary head has cosine 0 in
    every step.

    The formulas were compared with two implementations by others; neither the authors' code nor
    the paper's text was available. For cos = 0 the other implementations use [cos > 0].

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        main: The main objective, by name or position. A position counts only objectives that take
            part in a step, so give the name if some may be absent.
        mode: "weighted" or "unweighted".
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `main` is not a name or position.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[2.0, 0.0], [3.0, 4.0], [-1.0, 9.0]])
        >>> gk.CosineGate()(jacobian)  # 1, 3/5 and 0
        tensor([3.8000, 2.4000])
        >>> gk.CosineGate(mode="unweighted")(jacobian)
        tensor([5., 4.])
    """

    main: str | int = 0
    mode: Literal["weighted", "unweighted"] = "weighted"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_main(self.main)
        if self.mode not in ("weighted", "unweighted"):
            raise ValueError(f"mode is {self.mode!r}; choose 'weighted' or 'unweighted'")

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        main = inputs.index(self.main)
        cosine = cosines(wide)[..., main, :]
        weights = cosine.clamp(min=0) if self.mode == "weighted" else (cosine >= 0).to(wide)
        weights = weights.clone()
        weights[..., main] = 1
        return narrowed(weights, finite, gram), memory


def check_main(main: object) -> None:
    """Check the argument `main`.

    Raises:
        TypeError: If it is not a name or position.
    """
    if isinstance(main, bool) or not isinstance(main, (str, int)):
        raise TypeError(f"main is {main!r}; pass the main objective's name or position")
