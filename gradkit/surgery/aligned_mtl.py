"""Gradients made orthogonal, with equal norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Preference, Remembered, RuleInputs, Weighed, check_preference
from gradkit.surgery.rule import GramRule
from gradkit.surgery.spectrum import narrowed, rank, reciprocal, widened

ScaleMode = Literal["min", "median", "rmse"]


@dataclass(eq=False)
class AlignedMTL(GramRule):
    """Independent component alignment ([Senushkin et al., CVPR 2023](https://arxiv.org/abs/2305.19000)).

    Algorithm 1, with p the preference and the r nonzero eigenvalues λ of the Gram matrix:

        G = V·Λ·Vᵀ
        B = √s·V·Λ^(−1/2)·Vᵀ       s = λ_min, or by `scale_mode` the median or mean of the λ
        d = Σ_i (B·p)_i·g_i

    The rows of B·J are orthogonal vectors of norm √s, the nearest ones to the gradients.

    The number of nonzero eigenvalues is the rank, which is computed from cosines and hence
    scale-invariant: eigenvalues of the matrix of cosines above 1e-7 of its largest count (about the
    precision of the authors' float32 code). Eigenvalues that double precision cannot distinguish
    from zero in G itself are dropped, too: a gradient whose norm is 1e-8 of the largest has no
    effect. A zero gradient has weight 0; if all are zero, the weights are p.

    The default p is the mean, as in TorchJD; the authors' code takes the sum (1 each).

    Homogeneous of degree 1. Cost: none beyond the gradients; two eigendecompositions of K × K
    matrices, for which the host waits if they run on a GPU. State: none.

    Args:
        preference: p, one number of at least 0 for each objective, in their order or by their
            names. None: 1/K each.
        scale_mode: Which eigenvalue sets the common norm: "min" (the paper), "median" (the lower of
            two in the middle) or "rmse" (the mean), as in the authors' code.
        scope: The parameters over which inner products are computed: all ("global"), each "group",
            each "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If `preference` is not a sequence or mapping of numbers.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> gk.AlignedMTL()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.2133, 0.9673, 0.9673])
    """

    preference: Preference | None = None
    scale_mode: ScaleMode = "min"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_preference("preference", self.preference, least=0)
        if self.scale_mode not in ("min", "median", "rmse"):
            raise ValueError(f"scale_mode is {self.scale_mode!r}; choose 'min', 'median' or 'rmse'")

    def solves(self, count: int) -> bool:
        return True

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        wide, finite = widened(gram)
        count = gram.shape[-1]
        preference = inputs.shares(self.preference, wide)
        values, vectors = torch.linalg.eigh(wide)
        smallest = count * torch.finfo(values.dtype).eps * values[..., -1:]
        place = torch.arange(count, device=values.device)
        kept = (place >= count - rank(wide)[..., None]) & (values > smallest)
        values = torch.where(kept, values, torch.zeros_like(values))
        factors = (_scale(values, kept, self.scale_mode) * reciprocal(values)).sqrt()
        parts = vectors.mT @ preference
        weights = (vectors @ (factors * parts)[..., None])[..., 0]
        weights = torch.where(kept.any(-1, keepdim=True), weights, preference)
        return narrowed(weights, finite, gram), memory


def _scale(
    values: Float[Tensor, "*batch K"], kept: Bool[Tensor, "*batch K"], mode: ScaleMode
) -> Float[Tensor, "*batch 1"]:
    """The eigenvalue that sets the common norm, among those kept, which are the last ones."""
    number = kept.sum(-1, keepdim=True)
    if mode == "rmse":
        return values.sum(-1, keepdim=True) / number.clamp(min=1)
    above_first = (number - 1).clamp(min=0) // 2 if mode == "median" else 0
    index = (values.shape[-1] - number + above_first).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, index)
