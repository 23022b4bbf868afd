"""The more certain of two predictions: the adapted model's or the source model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.teachers.copying import copied
from gradkit.tta.adapter import Adapter
from gradkit.tta.distributions import log_distributions
from gradkit.tta.objectives import (
    Logits,
    Model,
    Probabilities,
    check_probabilities,
    logits_of,
    resolve_probabilities,
)
from gradkit.tta.statistics import install_statistics


def itself(model: nn.Module) -> nn.Module:
    """The model.

    Examples:
        >>> itself(nn.Linear(1, 2))
        Linear(in_features=1, out_features=2, bias=True)
    """
    return model


def class_weighted_entropy(
    logits: Logits,
    class_weights: Sequence[int | float] | None = None,
    probabilities: Probabilities = "auto",
) -> Float[Tensor, " batch"]:
    """−Σ w_c·p·log p / Σ p of each image, the sums over classes c and positions, in nats.

    The mean of −log p over what is predicted as present: with sigmoids the background, p ≈ 0, does
    not count.

    Args:
        logits: [N, C, *positions].
        class_weights: w, one for each class; all 1 by default.
        probabilities: The meaning of the logits; see `TENT`.

    Raises:
        ValueError: If there are other numbers of weights than of classes, or `probabilities` has no
            valid value.

    Examples:
        >>> logits = torch.tensor([[[0.0, -100.0], [0.0, -100.0]]])  # p = ½ and 0, of two classes
        >>> class_weighted_entropy(logits, (5, 1))  # (5 + 1)/2 · log 2
        tensor([2.0794])
    """
    if class_weights is not None and len(class_weights) != logits.shape[1]:
        raise ValueError(
            f"class_weights has {len(class_weights)} weights, but the logits have shape "
            f"{list(logits.shape)}: pass one weight for each of the {logits.shape[1]} classes"
        )
    log_p = log_distributions(logits, probabilities)
    softmax = resolve_probabilities(probabilities, logits) == "softmax"
    by_class = log_p[:, 0] if softmax else log_p[:, :, 0]
    by_class = by_class.reshape(*by_class.shape[:2], -1)
    p = by_class.exp()
    terms = -(p * by_class.clamp_min(torch.finfo(p.dtype).min)).sum(dim=2)
    if class_weights is not None:
        terms = terms * terms.new_tensor(class_weights)
    return terms.sum(dim=1) / p.sum(dim=(1, 2)).clamp_min(torch.finfo(p.dtype).tiny)


class LowerEntropy:
    """Predicts with the adapted model where it is more certain than the source model; see `PASS`.

    The source model is a copy from before adaptation, with its own running statistics. Each image
    gets the prediction with the lower `class_weighted_entropy`; the source's, if they are equal or
    the adapted one is not finite.

    Cost: 2 forward passes.

    Args:
        class_weights: One weight for each class; all 1 by default.
        probabilities: The meaning of the logits; see `TENT`.
        source: From the adapter's model to the source model in it: `itself`, or for methods that
            wrap the model, such as `VPTTA`, `lambda model: model.model`.

    Attributes:
        facts: Which images got the "adapted" prediction [N], and the "entropies" [2, N] of the
            adapted and of the source's.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If a weight is negative, or `probabilities` has no valid value; in a prediction,
            if there are other numbers of weights than of classes.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.TENT(model, predict=LowerEntropy(class_weights=(5, 1)))
        >>> adapter(torch.rand(4, 3, 8, 8)).shape, adapter.facts["adapted"].shape
        (torch.Size([4, 2, 8, 8]), torch.Size([4]))
    """

    def __init__(
        self,
        class_weights: Sequence[int | float] | None = None,
        probabilities: Probabilities = "auto",
        source: Callable[[nn.Module], nn.Module] = itself,
    ) -> None:
        for weight in class_weights or ():
            check_number("class_weights", weight, least=0)
        check_probabilities(probabilities)
        self.class_weights, self.probabilities = class_weights, probabilities
        self.choose = source
        self.source: nn.Module | None = None
        self.facts: dict[str, Tensor] = {}

    def attach(self, adapter: Adapter) -> None:
        """Copy the source model."""
        self.source = install_statistics(copied(self.choose(adapter.model)), "source")

    def __call__(self, model: Model, images: Tensor) -> Logits:
        """The logits, image by image of one of the models."""
        assert self.source is not None
        both = [logits_of(each, images) for each in (model, self.source)]
        entropies = torch.stack(
            [class_weighted_entropy(z, self.class_weights, self.probabilities) for z in both]
        )
        lower = entropies[0] < entropies[1]
        self.facts = {"adapted": lower, "entropies": entropies}
        adapted, source = both
        return torch.where(lower.reshape(-1, *[1] * (source.dim() - 1)), adapted, source)
