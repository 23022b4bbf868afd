"""The variants that learn: a student of the fusion with fixed weights, fused in two ways."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.composition.variants import Variant, blended, score, weights_of
from examples.common.datasets import Sample
from examples.fundus.fusion import FIXED
from examples.fundus.gate import CupGate, CupRatio
from gradkit import tta

STUDENTS = {
    "distilled, fixed": Variant(26, backwards=2),
    "distilled, gated": Variant(26, backwards=2),
}


class Student:
    """Adapts by distillation from the fusion with fixed weights; what is learnt stays.

    Args:
        model: the source model, which is not changed.
        ratio: of cup to disc in the source's labels.
        seed: of the strong views.
    """

    def __init__(self, model: nn.Module, ratio: CupRatio, seed: int) -> None:
        self.gate = CupGate(ratio)
        self.candidates = torch.zeros(0)

        def keep(candidates: Tensor) -> Tensor:
            self.candidates = candidates[:, 0].cpu()
            return self.gate(candidates)

        self.adapter = tta.DistilledFuse(
            model,
            tta.Fusion(weights=FIXED),
            generator=torch.Generator().manual_seed(seed),
            predict=tta.Fusion(gate=keep),
        )

    def __call__(
        self, image: Float[Tensor, "channels height width"]
    ) -> dict[str, Float[Tensor, "2 height width"]]:
        """The probabilities of both variants, on the CPU."""
        self.adapter(image.unsqueeze(0))
        (w,) = weights_of(self.gate, [self.candidates])
        fixed = FIXED[1][1]
        both = (blended(self.candidates, weight) for weight in (fixed, w))
        return dict(zip(STUDENTS, both, strict=True))


def score_students(
    predictions: Sequence[dict[str, Tensor]], samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Dice of disc and cup of both variants for each image, in %."""
    return [
        {"scores": {name: score(p, sample.target) for name, p in each.items()}}
        for each, sample in zip(predictions, samples, strict=True)
    ]
