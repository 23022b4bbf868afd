"""Selection of the gradients that are nearest to their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkit.core.arguments import check_count
from gradkit.core.flat import Scope
from gradkit.surgery.inputs import Remembered, RuleInputs, Weighed
from gradkit.surgery.rule import GramRule
from gradkit.surgery.spectrum import narrowed, widened


@dataclass(eq=False)
class Krum(GramRule):
    """Byzantine-tolerant selection ([Blanchard et al., NeurIPS 2017](https://proceedings.neurips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html)).

    Of K gradients, f of which may be arbitrary:

        score(i) = Σ ‖g_i − g_j‖²    over the K − f − 2 gradients j ≠ i nearest to g_i
        d = the gradient of the least score, or (Multi-Krum) the mean of the m of least score

    Distances are squared, as in the paper; TorchJD's are not, and may select others. Among equal
    scores the first is selected. The paper's guarantee needs K > 2f + 2. Fallback: with fewer than
    f + 3 gradients the score uses one neighbour (none for K = 1).

    ‖g_i − g_j‖² is G_ii + G_jj − 2·G_ij, which suffers from cancellation for near gradients:
    distances below 1e-8 of the gradients' norms are rounding error; for float32 gradients on a CPU,
    those below 1e-4.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: none.

    Args:
        n_byzantine: f ≥ 0, how many gradients may be arbitrary.
        n_selected: m ≥ 1, how many are averaged.
        scope: The parameters over which distances are computed: all ("global"), each "group", each
            "tensor", or those "shared" by objectives.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If an argument has no valid value, or if there are fewer gradients than
            `n_selected`.

    Examples:
        >>> import torch, gradkit as gk
        >>> gradients = torch.tensor([[1.0, 0.0], [1.2, 0.1], [90.0, -70.0], [0.9, 0.1]])
        >>> gk.Krum(n_byzantine=1)(gradients)
        tensor([1., 0.])
        >>> gk.Krum(n_byzantine=1, n_selected=2).weights(gradients @ gradients.T)
        tensor([0.5000, 0.0000, 0.0000, 0.5000])
    """

    n_byzantine: int = 0
    n_selected: int = 1
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_count("n_byzantine", self.n_byzantine, 0)
        check_count("n_selected", self.n_selected)

    def weigh(self, inputs: RuleInputs, memory: Remembered) -> Weighed:
        gram = inputs.gram
        count = gram.shape[-1]
        if self.n_selected > count:
            raise ValueError(
                f"n_selected is {self.n_selected}, but there are {count} gradients; pass at most "
                f"{count}"
            )
        wide, finite = widened(gram)
        squares = wide.diagonal(dim1=-2, dim2=-1)
        distances = (squares[..., :, None] + squares[..., None, :] - 2 * wide).clamp(min=0)
        distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        neighbours = min(max(count - self.n_byzantine - 2, 1), count - 1)
        scores = distances.sort(-1).values[..., :neighbours].sum(-1)
        selected = scores.argsort(dim=-1, stable=True)[..., : self.n_selected]
        weights = torch.zeros_like(scores).scatter(-1, selected, 1 / self.n_selected)
        return narrowed(weights, finite, gram), memory
