"""A gate for disc and cup: how much of two candidates each image's cup takes.

`gradkit.tta.Fuse` mixes predictions under several statistics, class by class. Here the two
candidates are u0, under the source's statistics, and u1, under 0.2 of the source's and 0.8 of the
image's own. The disc is u1's. The cup is (1 − w)·u0 + w·u1 with a weight w for each image, chosen
without labels by two cues of the candidates' masks. This is no published method. Cues and constants
were found on the four centres of `docs/composition.md`, at 128 pixels; areas are in pixels of
images of this size.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import Dataset

from examples.common.datasets import Sample, length

Masks = Bool[Tensor, "*leading height width"]
PerMask = Float[Tensor, "*leading"]
Candidates = Float[Tensor, "2 batch 2 height width"]
PerImage = Float[Tensor, " batch"]

SMALLEST = 20  # pixels; the shape of a smaller mask says nothing
OFFSET = 16  # pixels; keeps the ratio of a small disc finite


@dataclass(frozen=True)
class CupRatio:
    """What the gate knows of the source: the ratio of cup to disc in its training labels.

    Attributes:
        mean: over images; see `cup_ratio`.
        deviation: over images.
    """

    mean: float
    deviation: float


def roundness(masks: Masks) -> PerMask:
    """How close masks are to ellipses, from 0 to 1.

    E is the intersection over union of a mask with the ellipse of its centre and covariance, the
    pixels of squared Mahalanobis distance ≤ 4: a filled ellipse with half axis a has the variance
    a²/4 along it. It is 0 for less than 20 pixels, and for pixels on one line.

    Example:
        >>> rows, columns = torch.arange(32)[:, None] - 16, torch.arange(32) - 16
        >>> ellipse = (rows / 14).square() + (columns / 7).square() <= 1
        >>> halved = ellipse & (rows < 0)
        >>> bool(roundness(ellipse) > 0.97), bool(roundness(halved) < 0.9)
        (True, True)
    """
    inside = masks.double()
    rows = torch.arange(masks.shape[-2], device=masks.device).double().unsqueeze(1)
    columns = torch.arange(masks.shape[-1], device=masks.device).double()
    area = inside.sum((-2, -1), keepdim=True)

    def mean(values: Tensor) -> Tensor:
        return (inside * values).sum((-2, -1), keepdim=True) / area.clamp_min(1)

    y, x = rows - mean(rows), columns - mean(columns)
    yy, xx, yx = mean(y * y), mean(x * x), mean(y * x)
    determinant = yy * xx - yx.square()
    ellipse = xx * y.square() - 2 * yx * y * x + yy * x.square() <= 4 * determinant
    shared, either = (part.double().sum((-2, -1)) for part in (masks & ellipse, masks | ellipse))
    overlap = shared / either.clamp_min(1)
    has_shape = ((area >= SMALLEST) & (determinant > 1e-6))[..., 0, 0]
    return torch.where(has_shape, overlap, 0.0)


def cup_ratio(masks: Bool[Tensor, "*leading 2 height width"]) -> PerMask:
    """ρ = |cup|/(|disc| + 16), areas in pixels, of masks of disc and cup.

    Example:
        >>> masks = torch.ones(2, 4, 8, dtype=torch.bool)
        >>> masks[1, :, 4:] = False
        >>> float(cup_ratio(masks))  # 16/(32 + 16)
        0.333...
    """
    area = masks.double().sum((-2, -1))
    return area[..., 1] / (area[..., 0] + OFFSET)


def measure_cup_ratio(samples: Dataset[Sample]) -> CupRatio:
    """Mean and deviation (of the images themselves, not of a sample) of ρ over labels."""
    ratios = [cup_ratio(samples[index].target > 0.5) for index in range(length(samples))]
    values = torch.stack(ratios)
    return CupRatio(float(values.mean()), float(values.std(correction=0)))


def cues(candidates: Candidates, source: CupRatio) -> tuple[PerImage, PerImage]:
    """ΔE and ΔZ of each image, both positive where they speak for u1.

        ΔE = E(cup of u1) − E(cup of u0)              how much rounder u1's cup is
        ΔZ = (|ρ1 − m| − |ρ0 − m|)/s                  how much farther from the source's mean ratio

    Uncertain predictions shrink towards what the source has mostly seen, so that the farther one is
    the better one.

    Args:
        candidates: probabilities of disc and cup; masks are where they reach 0.5.
        source: m and s.
    """
    masks = candidates >= 0.5
    rounder = roundness(masks[:, :, 1])
    distance = (cup_ratio(masks) - source.mean).abs() / source.deviation
    return rounder[1] - rounder[0], distance[1] - distance[0]


@dataclass(frozen=True)
class CupGate:
    """w = sigmoid(30·ΔE + 4.5·ΔZ + 0.25), the share of u1 in an image's cup; see `cues`.

    A gate for `gradkit.tta.Fuse`, whose candidates are u0 and u1.

    Attributes:
        source: the ratio of cup to disc in the source's training labels.
        rounder: factor of ΔE.
        farther: factor of ΔZ.
        intercept: the rest.

    Raises:
        ValueError: the ratio does not vary over the source's labels.

    Example:
        >>> gate = CupGate(CupRatio(0.3, 0.1))
        >>> alike = torch.full((2, 1, 2, 8, 8), 0.4)
        >>> gate(alike)[:, 0]  # of u0 and u1, for disc and cup
        tensor([[0.0000, 0.4378],
                [1.0000, 0.5622]])
    """

    source: CupRatio
    rounder: float = 30.0
    farther: float = 4.5
    intercept: float = 0.25

    def __post_init__(self) -> None:
        if not self.source.deviation > 0:
            raise ValueError(
                f"the ratio of cup to disc is {self.source.mean:.3g} in all labels of the source, "
                "so that no distance from it can be measured; take labels that differ"
            )

    def __call__(self, candidates: Candidates) -> Float[Tensor, "2 batch 2"]:
        """The weights of both candidates for disc and cup."""
        rounder, farther = cues(candidates, self.source)
        w = torch.sigmoid(self.rounder * rounder + self.farther * farther + self.intercept)
        cup = torch.stack([1 - w, w])
        disc = torch.stack([torch.zeros_like(w), torch.ones_like(w)])
        return torch.stack([disc, cup], dim=2).to(candidates.dtype)
