"""Scores of cases (images, volumes) by name, and their means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length
from examples.common.metrics import Scorer, mean, segment


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case.

    Attributes:
        case: its name.
        scores: by name, such as the Dice of each structure by that structure's name; empty where
            there are no labels.
    """

    case: str
    scores: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean over the scores; of use where all have the same unit."""
        return sum(self.scores.values()) / len(self.scores)


def mean_scores(cases: Sequence[CaseScores]) -> dict[str, float]:
    """The mean of each score over cases, which must all have the same ones.

    Raises:
        ValueError: there are no cases.

    Example:
        >>> mean_scores([CaseScores("a", {"dice": 80.0}), CaseScores("b", {"dice": 90.0})])
        {'dice': 85.0}
    """
    if not cases:
        raise ValueError("there are no cases to average over; give at least one")
    return {name: mean([case.scores[name] for case in cases]) for name in cases[0].scores}


@torch.no_grad()
def score_cases(
    model: nn.Module, samples: Dataset[Sample], device: torch.device, score: Scorer
) -> list[CaseScores]:
    """Scores the predictions of a model, one sample at a time, without adaptation.

    The model is put in evaluation mode.

    Args:
        model: takes a batch of images and returns logits [n, structures, *space].
        samples: with targets.
        device: where the model is.
        score: takes prediction and target of one sample on the CPU.
    """
    model.eval()
    cases = []
    for index in range(length(samples)):
        sample = samples[index]
        logits: Any = model(sample.image.unsqueeze(0).to(device)).cpu()[0]
        scores = score(segment(logits.float()), sample.target)
        cases.append(CaseScores(sample.name, scores))
    return cases
