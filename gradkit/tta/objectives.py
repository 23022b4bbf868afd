"""Losses that need no label: what a model is adapted by on a test image.

An objective is called as `objective(model, image)`, where `model(image)` gives one logit for each
class and pixel, and classes are independent of each other (sigmoid, not softmax: the optic cup lies
within the disc). It returns a scalar to be minimised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gradkit.tta.augment import StrongAugmentation, minmax
from gradkit.tta.views import WEAK_VIEWS, View

Image = Float[Tensor, "batch channels *spatial"]
Logits = Float[Tensor, "batch classes *positions"]
Scalar = Float[Tensor, ""]
Model = Callable[[Tensor], Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def one_sided_entropy(logits: Logits, eps: float = 1e-6) -> Scalar:
    """−Σ_c p·log(p + ε), averaged over images and pixels, with p = sigmoid(logits).

    The term of class c alone, without that of its complement. It peaks at p = 1/e, so minimising
    it pushes every pixel above 0.368 towards the foreground.

    Examples:
        >>> one_sided_entropy(torch.zeros(1, 2, 4, 4)).item() / 2  # ½·log 2
        0.346...
    """
    p = torch.sigmoid(_at_least_float32(logits))
    return -(p * torch.log(p + eps)).sum(dim=1).mean()


def two_sided_entropy(logits: Logits) -> Scalar:
    """−Σ_c [p·log p + (1 − p)·log(1 − p)], averaged over images and pixels; exact at any logit.

    Examples:
        >>> two_sided_entropy(torch.zeros(1, 2, 4, 4)).item() / 2  # log 2
        0.693...
    """
    z = _at_least_float32(logits)
    # 1 − p is sigmoid(−z): every product below keeps its relative precision at large |z|.
    terms = torch.sigmoid(z) * F.logsigmoid(z) + torch.sigmoid(-z) * F.logsigmoid(-z)
    return -terms.sum(dim=1).mean()


def entropy(model: Model, image: Image) -> Scalar:
    """Entropy of the prediction, as GraTa's fundus experiments (and their TENT) compute it.

    GraTa (https://arxiv.org/abs/2408.07343), after TENT (https://arxiv.org/abs/2006.10726). This is
    the one-sided entropy of its released code: it peaks at p = 1/e, not ½, so that pixels above
    0.368 are pushed towards the foreground. `binary_entropy` is the symmetric one.

    Raises:
        ValueError: If the model does not return logits [N, C, ...].

    Examples:
        >>> entropy(lambda image: 100 * image, torch.ones(1, 2, 4, 4)).abs() < 1e-5  # certain
        tensor(True)
    """
    return one_sided_entropy(_logits(model, image))


def binary_entropy(model: Model, image: Image) -> Scalar:
    """Entropy of each class against its complement, summed over classes, averaged over pixels.

    Raises:
        ValueError: If the model does not return logits [N, C, ...].

    Examples:
        >>> binary_entropy(lambda image: -image, torch.zeros(1, 1, 4, 4))
        tensor(0.6931)
    """
    return two_sided_entropy(_logits(model, image))


def mean_prediction(model: Model, image: Image, views: Sequence[View] = WEAK_VIEWS) -> Logits:
    """Probabilities [N, C, H, W], averaged over views that are each predicted and mapped back.

    One forward pass a view, without gradients. Views may differ in shape (a quarter turn of an
    image that is not square).

    Raises:
        ValueError: If there is no view, or the model does not return logits [N, C, ...].

    Examples:
        >>> image = torch.tensor([[[[0.0, 9.0]]]])
        >>> mean_prediction(lambda x: x, image)  # an equivariant model: all views agree
        tensor([[[[0.5000, 0.9999]]]])
    """
    if not views:
        raise ValueError("at least one view is needed to average predictions.")
    device = image.device.type
    # Autocast may cache weights that it casts here, without gradients, and then silently cut the
    # gradient of the next forward pass (pytorch/pytorch#158232): let it cache nothing.
    autocast = torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )
    with torch.no_grad(), autocast:
        predictions = [
            view.inverse(torch.sigmoid(_at_least_float32(_logits(model, view.forward(image)))))
            for view in views
        ]
        return torch.stack(predictions).mean(dim=0)


class Consistency:
    """Agreement of a strongly augmented image's prediction with the mean over weak views.

    GraTa's pseudo objective (https://arxiv.org/abs/2408.07343):

        q = mean over views of view⁻¹(sigmoid(model(view(x))))         a constant
        loss = BCE(sigmoid(model(minmax(strong(x)))), q)               mean over everything

    Costs one forward pass a view and one with gradients. Every call, one at displaced weights in
    the same step too, draws a new augmentation from
    `generator`, which is the only state; restore it by `load_state_dict` to see the same again.

    Args:
        views: Weak views with their inverses.
        augmentation: `(image, generator) -> image`, of the same shape.
        generator: Where random numbers come from; by default one of its own, seeded with 0.

    Examples:
        >>> consistency = Consistency(generator=torch.Generator().manual_seed(1))
        >>> model = torch.nn.Conv2d(3, 2, kernel_size=3, padding=1)
        >>> loss = consistency(model, torch.rand(1, 3, 8, 12))
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
    """

    def __init__(
        self,
        views: Sequence[View] = WEAK_VIEWS,
        augmentation: Augmentation | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.views = tuple(views)
        self.augmentation = StrongAugmentation() if augmentation is None else augmentation
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss on a batch of images [N, C, H, W] in [0, 1].

        Raises:
            ValueError: If the model does not return logits [N, C, ...], there is no view, or the
                image is not one that the augmentation accepts.
        """
        target = mean_prediction(model, image, self.views)
        strong = minmax(self.augmentation(image, self.generator))
        logits = _at_least_float32(_logits(model, strong))
        return F.binary_cross_entropy_with_logits(logits, target)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the random numbers where `state_dict` was taken.

        Raises:
            ValueError: If there is no generator state in it.
        """
        if set(state_dict) != {"generator"}:
            raise ValueError(
                'the state of a Consistency has one entry, "generator", but the state to load has '
                f"{sorted(state_dict)}."
            )
        self.generator.set_state(state_dict["generator"].cpu())


def _logits(model: Model, image: Tensor) -> Tensor:
    """The model's output, if it is what an objective can use."""
    logits = model(image)
    if isinstance(logits, Tensor) and logits.dim() >= 2 and len(logits) == len(image):
        return logits
    got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(
        f"the model must return logits [N, C, ...] for images of shape {list(image.shape)}, but "
        f"returned {got}: wrap it in a module that returns its logits only."
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
