"""What each variant of the fusion predicts, from the same candidates of a centre's images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.composition.candidates import Candidates
from examples.common.datasets import Sample
from examples.common.metrics import dice
from examples.fundus.fusion import FIXED
from examples.fundus.gate import CupGate, CupRatio, cues

GRID = tuple(step / 10 for step in range(11))
"""Weights of u1 for which the cup's Dice is kept, so that further gates can be tried on results."""

Probabilities = Float[Tensor, "2 height width"]
Weights = Sequence[float]


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        passes: forward passes for an image.
        backwards: backward passes.
    """

    passes: int
    backwards: int = 0


VARIANTS = {
    "No Adapt": Variant(1),
    "No Adapt, views": Variant(6),
    "PTBN": Variant(1),
    "0.8 test, views": Variant(6),
    "fused (fixed per class)": Variant(12),
    "gated": Variant(12),
    "gated, without views": Variant(2),
    "gated, ΔE only": Variant(12),
    "gated, ΔZ only": Variant(12),
    "control: weights of other images": Variant(12),
    "control: gate reversed": Variant(12),
    "oracle by label (no method)": Variant(12),
}


def blended(pair: Float[Tensor, "2 2 height width"], w: float) -> Probabilities:
    """The disc of the second candidate, and the cup of both with the weight w of the second."""
    return torch.stack([pair[1, 0], (1 - w) * pair[0, 1] + w * pair[1, 1]])


def weights_of(gate: CupGate, pairs: Sequence[Float[Tensor, "2 2 height width"]]) -> list[float]:
    """A gate's weight of the second candidate's cup, for each image."""
    return [float(gate(pair.unsqueeze(1))[1, 0, 1]) for pair in pairs]


def predict_all(
    candidates: Sequence[Candidates], ratio: CupRatio, seed: int
) -> dict[str, list[Probabilities]]:
    """The probabilities of every variant but the oracle, for each image of a centre.

    Args:
        candidates: of the images.
        ratio: of cup to disc in the source's labels.
        seed: of the control that exchanges the gate's weights between images.
    """
    alone = [each.alone for each in candidates]
    viewed = [each.viewed for each in candidates]
    gate = CupGate(ratio)
    gated = weights_of(gate, viewed)
    order = torch.randperm(len(gated), generator=torch.Generator().manual_seed(seed)).tolist()

    def with_weights(weights: Weights) -> list[Probabilities]:
        return [blended(pair, w) for pair, w in zip(viewed, weights, strict=True)]

    return {
        "No Adapt": [each[0] for each in alone],
        "No Adapt, views": [each[0] for each in viewed],
        "PTBN": [each[2] for each in alone],
        "0.8 test, views": [each[1] for each in viewed],
        "fused (fixed per class)": with_weights([FIXED[1][1]] * len(viewed)),
        "gated": with_weights(gated),
        "gated, without views": [
            blended(pair[:2], w)
            for pair, w in zip(alone, weights_of(gate, [each[:2] for each in alone]), strict=True)
        ],
        "gated, ΔE only": with_weights(weights_of(CupGate(ratio, farther=0.0), viewed)),
        "gated, ΔZ only": with_weights(weights_of(CupGate(ratio, rounder=0.0), viewed)),
        "control: weights of other images": with_weights([gated[index] for index in order]),
        "control: gate reversed": with_weights([1 - w for w in gated]),
    }


def score(p: Probabilities, target: Float[Tensor, "2 height width"]) -> list[float]:
    """Dice of disc and cup, in %, with two decimals."""
    return [round(value, 2) for value in dice(p >= 0.5, target, dimensions=2).tolist()]


def cues_of(
    each: Candidates, target: Float[Tensor, "2 height width"], ratio: CupRatio
) -> dict[str, Any]:
    """What gates may look at in one image, and the cup's Dice for weights in `GRID`."""
    rounder, farther = cues(each.viewed.unsqueeze(1), ratio)
    return {
        "shift": round(each.shift, 4),
        "rounder": round(float(rounder), 5),
        "farther": round(float(farther), 5),
        "cup_by_weight": [score(blended(each.viewed, w), target)[1] for w in GRID],
    }


def score_all(
    candidates: Sequence[Candidates], samples: Sequence[Sample], ratio: CupRatio, seed: int
) -> list[dict[str, Any]]:
    """For each image what gates may look at, and Dice of disc and cup of every variant, in %."""
    predictions = predict_all(candidates, ratio, seed)
    rows = []
    for index, (each, sample) in enumerate(zip(candidates, samples, strict=True)):
        scores = {name: score(p[index], sample.target) for name, p in predictions.items()}
        first, second = (score(u, sample.target) for u in each.viewed)
        scores["oracle by label (no method)"] = [
            max(pair) for pair in zip(first, second, strict=True)
        ]
        rows.append({**cues_of(each, sample.target, ratio), "scores": scores})
    return rows
