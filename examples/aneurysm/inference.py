"""Segmentation of whole volumes by a sliding window, and the scores of cases."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn
from torch.utils.data import Dataset

from examples.aneurysm.data import ANEURYSM, STRUCTURES
from examples.common.datasets import Sample, length
from examples.common.metrics import overlaps
from examples.common.scores import CaseScores

OVERLAP = 0.5  # of neighbouring windows, along each axis
EMPTY = "empty"
"""Name of a further score: 100 where prediction or target of the aneurysm is empty, else 0.

Its mean is the share of such cases.
"""


@torch.no_grad()
def segment_volume(
    model: nn.Module,
    image: Float[Tensor, "1 d h w"],
    window: int,
    device: torch.device,
    mirror: bool = False,
    amp: bool = False,
) -> Int[Tensor, "d h w"]:
    """The most probable class of each voxel, by windows with Gaussian weights.

    The model is put in evaluation mode and back.

    Args:
        model: As `build_network` makes it.
        image: Normalised.
        window: Side of the windows, voxels.
        device: Where the model is.
        mirror: Whether to average over all mirror images.
        amp: Whether to compute in half precision.
    """
    inferer = SlidingWindowInferer(
        window, sw_batch_size=2, overlap=OVERLAP, mode="gaussian", padding_mode="replicate"
    )
    training = model.training
    model.eval()

    def probabilities(patches: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=amp):
            logits: Tensor = model(patches).logits
        return logits.float().softmax(1)

    total: Any = 0
    for axes in _mirrors() if mirror else [()]:
        turned = image[None].to(device).flip(axes)
        total = total + inferer(turned, probabilities).flip(axes)
    model.train(training)
    result: Tensor = total[0].argmax(0).cpu()
    return result


def score_case(
    prediction: Int[Tensor, "d h w"], target: Float[Tensor, "2 d h w"]
) -> dict[str, float]:
    """Scores of the aneurysm of one case, by `overlaps`, and whether one of the two is empty."""
    aneurysm: Bool[Tensor, "d h w"] = prediction == ANEURYSM
    actual = target[STRUCTURES.index("aneurysm")]
    empty = not (aneurysm.any() and actual.any())
    return {**overlaps(aneurysm, actual), EMPTY: 100.0 * empty}


def score_volumes(
    model: nn.Module,
    samples: Dataset[Sample],
    window: int,
    device: torch.device,
    mirror: bool = False,
    amp: bool = False,
    cases: Sequence[int] | None = None,
) -> tuple[list[CaseScores], list[Tensor]]:
    """Scores and predictions of volumes.

    Args:
        model: As for `segment_volume`, which tells of the next arguments, too.
        samples: Those without labels are segmented, not scored.
        window: Side of the windows, voxels.
        device: Where the model is.
        mirror: Whether to average over all mirror images.
        amp: Whether to compute in half precision.
        cases: Which samples; None is all.
    """
    scores, predictions = [], []
    for index in range(length(samples)) if cases is None else cases:
        sample = samples[index]
        prediction = segment_volume(model, sample.image, window, device, mirror, amp)
        of_case = score_case(prediction, sample.target) if sample.has_labels else {}
        scores.append(CaseScores(sample.name, of_case))
        predictions.append(prediction)
    return scores, predictions


def _mirrors() -> Iterator[tuple[int, ...]]:
    """The sets of spatial axes of a batch [1, 1, D, H, W], the empty one first."""
    for count in range(4):
        yield from combinations((2, 3, 4), count)
