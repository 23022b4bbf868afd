"""Mixed statistics and prototypes of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import Distributions, log_distributions, to_logits
from gradkit.tta.features import captured_inputs, classifier_of
from gradkit.tta.objectives import Logits, Probabilities, check_probabilities, logits_of
from gradkit.tta.statistics import Mixed, Statistics, at_least_float32

Prototypes = Float[Tensor, "units outcomes features"]
Exists = Bool[Tensor, "units outcomes"]


def prototypes_of(
    features: Float[Tensor, "batch features *positions"],
    p: Distributions,
    confidence: int | float,
) -> tuple[Prototypes, Exists]:
    """Mean features of the positions whose most probable outcome has at least this probability.

    Returns:
        The means, 0 for outcomes without any such position, and which outcomes have one; none has
        where a feature is not finite.

    Examples:
        >>> features = torch.tensor([[[1.0, 3.0, 9.0]]])
        >>> p = torch.tensor([[[[0.9, 0.95, 0.6], [0.1, 0.05, 0.4]]]])
        >>> prototypes_of(features, p, 0.9)
        (tensor([[[2.],
                 [0.]]]), tensor([[ True, False]]))
    """
    f = features.reshape(*features.shape[:2], -1)
    q = p.reshape(*p.shape[:3], -1)
    largest = q.amax(dim=2, keepdim=True)
    chosen = (q == largest) & (largest >= confidence)
    counts = chosen.sum(dim=(0, 3))
    sums = torch.einsum("nukm,ndm->ukd", chosen.to(f.dtype), f)
    means = sums / counts.clamp_min(1).unsqueeze(2)
    return means, (counts > 0) & means.isfinite().all(dim=2)


def weights_by_distance(
    features: Float[Tensor, "batch features *positions"],
    prototypes: Prototypes,
    exists: Exists,
    temperature: int | float,
) -> Distributions:
    """w_k ∝ exp(−‖F − c_k‖/τ) at each position, over the outcomes that have a prototype.

    Examples:
        >>> features = torch.tensor([[[0.0, 1.0]]])
        >>> prototypes = torch.tensor([[[0.0], [1.0]]])
        >>> weights_by_distance(features, prototypes, torch.tensor([[True, True]]), 1.0)
        tensor([[[[0.7311, 0.2689],
                  [0.2689, 0.7311]]]])
    """
    f = features.reshape(*features.shape[:2], -1).transpose(1, 2)
    units, outcomes, _ = prototypes.shape
    near = -torch.cdist(f, prototypes.flatten(0, 1).expand(len(f), -1, -1)) / temperature
    near = near.transpose(1, 2).reshape(len(f), units, outcomes, *features.shape[2:])
    known = exists.reshape(1, units, outcomes, *[1] * (features.dim() - 2))
    return near.masked_fill(~known, -torch.inf).softmax(dim=2)


class PrototypePredictor:
    """Predictions blended with the distances of features to prototypes of classes; see `DIGA`.

    State: the prototypes of the stream. A prediction commits them at its end.

    Args:
        classifier: The name of the module whose input are the features; by default the last linear
            or convolutional layer.
        confidence: The probability from which a prediction is a pseudo-label.
        decay: The decay of the stream's prototypes.
        stream_share: The share of the stream's prototypes against the present images'.
        prototype_share: The share of both in the result, against the model's prediction.
        temperature: τ.
        probabilities: The meaning of the logits; see `TENT`.

    Attributes:
        facts: Of which outcomes there were pseudo-labels in the last batch, "seen" [units,
            outcomes], and in the stream, "known".

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value; or, when the adapter is made, if there is no
            such module; or, in a prediction, if the features have not the logits' positions.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
        >>> adapter = gk.tta.PTBN(model, predict=gk.tta.PrototypePredictor())
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self,
        classifier: str | None = None,
        confidence: int | float = 0.9,
        decay: int | float = 0.9,
        stream_share: int | float = 0.8,
        prototype_share: int | float = 0.8,
        temperature: int | float = 1.0,
        probabilities: Probabilities = "auto",
    ) -> None:
        shares = {
            "confidence": confidence,
            "decay": decay,
            "stream_share": stream_share,
            "prototype_share": prototype_share,
        }
        for name, value in shares.items():
            check_number(name, value, least=0, most=1)
        check_number("temperature", temperature, above=0)
        check_probabilities(probabilities)
        self.classifier, self.confidence, self.decay = classifier, confidence, decay
        self.stream_share, self.prototype_share = stream_share, prototype_share
        self.temperature, self.probabilities = temperature, probabilities
        self.facts: dict[str, Tensor] = {}
        self.prototypes: Prototypes | None = None
        self.exists: Exists | None = None

    def attach(self, adapter: Adapter) -> None:
        """Check that the classifier is there.

        Raises:
            ValueError: If it is not.
        """
        classifier_of(adapter.model, self.classifier)

    def __call__(self, model: nn.Module, images: Tensor) -> Logits:
        """The logits of the blended probabilities."""
        with captured_inputs(classifier_of(model, self.classifier)) as seen:
            logits = logits_of(model, images)
        features = at_least_float32(seen[-1])  # distances are not computed in half precision
        if features.shape[2:] != logits.shape[2:] or len(features) != len(logits):
            raise ValueError(
                f"the classifier reads features of shape {list(features.shape)}, but the logits "
                f"have shape {list(logits.shape)}: prototypes need features at each position of "
                "the logits. Pass classifier= the name of a module that reads such features."
            )
        p = log_distributions(logits, self.probabilities).exp()
        present, exists = prototypes_of(features, p, self.confidence)
        stream, known = self._moved(present, exists)
        near_stream = self._near(features, stream, known, p)
        near_present = self._near(features, present, exists, p)
        share = self.stream_share
        near = share * near_stream + (1 - share) * near_present
        blended = self.prototype_share * near + (1 - self.prototype_share) * p
        result = to_logits(blended, self.probabilities, logits)
        self.prototypes, self.exists = stream, known
        self.facts = {"seen": exists, "known": known}
        return result

    def _moved(self, present: Prototypes, exists: Exists) -> tuple[Prototypes, Exists]:
        if self.prototypes is None or self.exists is None:
            return present, exists
        moved = self.decay * self.prototypes + (1 - self.decay) * present
        known = self.exists.unsqueeze(2)
        moved = torch.where(known, moved, present)
        return torch.where(exists.unsqueeze(2), moved, self.prototypes), self.exists | exists

    def _near(
        self, features: Tensor, prototypes: Prototypes, exists: Exists, p: Distributions
    ) -> Distributions:
        """The weights by distance; where fewer than two prototypes exist, the prediction itself."""
        compared = exists.sum(dim=1) > 1
        near = weights_by_distance(features, prototypes, exists, self.temperature)
        return torch.where(compared.reshape(1, -1, *[1] * (p.dim() - 2)), near, p)

    def state_dict(self) -> dict[str, Any]:
        """The prototypes, None before the first batch."""
        return {"prototypes": self.prototypes, "exists": self.exists}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.prototypes, self.exists = state_dict["prototypes"], state_dict["exists"]


def DIGA(  # noqa: N802 # the method's name
    model: nn.Module,
    statistics: str | Statistics = Mixed(0.8),  # noqa: B008 # immutable
    classifier: str | None = None,
    confidence: int | float = 0.9,
    decay: int | float = 0.9,
    stream_share: int | float = 0.8,
    prototype_share: int | float = 0.8,
    temperature: int | float = 1.0,
    probabilities: Probabilities = "auto",
    **options: Any,
) -> Adapter:
    """Dynamically instance-guided adaptation (DIGA, CVPR 2023).

    [Dynamically Instance-Guided Adaptation: A Backward-free Approach for Test-Time Domain Adaptive
    Semantic Segmentation](https://doi.org/10.1109/CVPR52729.2023.02307), with F the features that
    the classifier reads and P the prediction:

        μ = 0.8·μ_source + 0.2·μ_image,   v likewise (biased)      in every BatchNorm
        c_k = mean of F where P_k ≥ 0.9                            the images' prototypes
        C_k ← 0.9·C_k + 0.1·c_k                                    the stream's; the first is c_k
        w(c)_k ∝ exp(−‖F − c_k‖/τ)                                 over prototypes that exist
        result = 0.8·[0.8·w(C) + 0.2·w(c)] + 0.2·P

    For sigmoids each class has two prototypes, of positions where it is present (p ≥ 0.9) and where
    it is absent (p ≤ 0.1). Where a class has fewer than two prototypes to choose from, w is P. The
    released code updates its prototypes with labels after the first image; this one never sees any.
    That C is updated before it is used is a reading of the paper.

    Cost: 1 forward pass, and the distances; no gradients. State: the prototypes.

    Args:
        model: The source model; see `Adapter`. Its logits need the features' positions.
        statistics: Where mean and variance come from; see `Adapter`.
        classifier: The name of the module that reads the features; by default the last linear or
            convolutional layer, as registered.
        confidence: The probability from which a prediction is a pseudo-label.
        decay: The decay of the stream's prototypes.
        stream_share: The stream's share in w.
        prototype_share: The prototypes' share in the result.
        temperature: τ.
        probabilities: The meaning of the logits; see `TENT`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        TypeError: If a number is none.
        ValueError: If an argument has no valid value or there is no such module; in a call, if the
            features have not the logits' positions.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1)
        ... ).eval()
        >>> gk.tta.DIGA(model)(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """
    predict = PrototypePredictor(
        classifier,
        confidence,
        decay,
        stream_share,
        prototype_share,
        temperature,
        probabilities,
    )
    return Adapter(model, statistics=statistics, **{"predict": predict, **options})
