"""Losses without labels, by which a model adapts to test images.

An objective is called as `objective(model, image)`, where `model(image)` returns logits [N, C] or
[N, C, ...], and returns a scalar to minimise. The meaning of the logits depends on the task: a
softmax if exactly one class is right, independent sigmoids if several may be (the optic cup lies
within the disc). The two are not interchangeable: a shift of all logits of an image changes every
sigmoid and no softmax.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gradkit.core.caller import caller_level
from gradkit.tta.augment import StrongAugmentation, minmax
from gradkit.tta.statistics import at_least_float32
from gradkit.tta.vectorised import in_autocast, vectorised
from gradkit.tta.views import WEAK_VIEWS, View, check_views

Image = Float[Tensor, "batch channels *spatial"]
Logits = Float[Tensor, "batch classes *positions"]
Scalar = Float[Tensor, ""]
Model = Callable[[Tensor], Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Probabilities = Literal["auto", "sigmoid", "softmax"]


def one_sided_entropy(logits: Logits, eps: float = 1e-6) -> Scalar:
    """−Σ_c p·log(p + ε), averaged over images and pixels, with p = sigmoid(logits).

    Only the term of class c, without that of its complement. Its maximum is at p = 1/e, so
    minimising it pushes every pixel above 0.368 towards the foreground.

    Examples:
        >>> one_sided_entropy(torch.zeros(1, 2, 4, 4)).item() / 2  # ½·log 2
        0.346...
    """
    p = torch.sigmoid(at_least_float32(logits))
    return -(p * torch.log(p + eps)).sum(dim=1).mean()


def two_sided_entropy(logits: Logits) -> Scalar:
    """−Σ_c [p·log p + (1 − p)·log(1 − p)], averaged over images and pixels.

    It is accurate for any logit.

    Examples:
        >>> two_sided_entropy(torch.zeros(1, 2, 4, 4)).item() / 2  # log 2
        0.693...
    """
    z = at_least_float32(logits)
    # 1 − p is sigmoid(−z): every product below keeps its relative precision for large |z|.
    terms = torch.sigmoid(z) * F.logsigmoid(z) + torch.sigmoid(-z) * F.logsigmoid(-z)
    return -terms.sum(dim=1).mean()


def categorical_entropy(logits: Logits) -> Scalar:
    """−Σ_c p_c·log p_c with p = softmax(logits) over the classes, averaged over the rest.

    All terms of the sum are positive, so that there is no cancellation: it is accurate for any
    logit, also if a class is excluded by a logit of −∞.

    Raises:
        ValueError: If there is a single class, whose softmax is always 1.

    Examples:
        >>> categorical_entropy(torch.zeros(1, 4)).item()  # log 4
        1.386...
    """
    # With m the largest logit's class and d = z − z_m: H = log Σ e^d − Σ d·e^d / Σ e^d.
    below, weights, log_total = _below_the_largest(at_least_float32(logits))
    # A d of −∞ contributes 0, but 0·∞ would be NaN.
    finite = below.clamp_min(torch.finfo(below.dtype).min)
    mean_below = (weights * finite).sum(dim=1) * torch.exp(-log_total.squeeze(1))
    return (log_total.squeeze(1) - mean_below).mean()


def _below_the_largest(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D = z − max z; e^d, with 0 for the largest; log Σ e^d, with the class axis kept.

    Raises:
        ValueError: If there is a single class.
    """
    if z.shape[1] == 1:
        raise ValueError(
            f"logits of shape {list(z.shape)} have a single class, whose softmax is always 1: take "
            'sigmoid probabilities (gradkit.tta.binary_entropy, or probabilities="sigmoid").'
        )
    largest = z.argmax(dim=1, keepdim=True)
    below = z - z.gather(1, largest)
    weights = torch.exp(below).scatter(1, largest, 0.0)
    return below, weights, torch.log1p(weights.sum(dim=1, keepdim=True))


def log_softmax(logits: Logits) -> Logits:
    """Logarithms of softmax probabilities over classes, accurate also for the largest.

    `torch.log_softmax` returns 0 if the largest probability differs from 1 by less than 1e-7.

    Raises:
        ValueError: If there is a single class.

    Examples:
        >>> log_softmax(torch.tensor([[0.0, -20.0]]))
        tensor([[-2.0612e-09, -2.0000e+01]])
    """
    below, _, log_total = _below_the_largest(at_least_float32(logits))
    return below - log_total


def resolve_probabilities(probabilities: Probabilities, logits: Logits) -> str:
    """Resolve "auto": "softmax" for classifiers of more than one class, else "sigmoid".

    A classifier has one position per image: logits [N, C], or [N, C, 1, 1]. Dense logits
    [N, C, ...] are sigmoids, as in the segmentation of discs and cups for which GraTa was
    published.

    Raises:
        ValueError: If it is not "auto", "sigmoid" or "softmax".

    Examples:
        >>> resolve_probabilities("auto", torch.zeros(8, 5))
        'softmax'
        >>> resolve_probabilities("auto", torch.zeros(8, 1)), resolve_probabilities(
        ...     "auto", torch.zeros(8, 5, 16, 16)
        ... )
        ('sigmoid', 'sigmoid')
    """
    check_probabilities(probabilities)
    if probabilities != "auto":
        return probabilities
    return "softmax" if is_classifier(logits) and logits.shape[1] > 1 else "sigmoid"


def check_probabilities(probabilities: str) -> None:
    """Check the argument `probabilities`.

    Raises:
        ValueError: If it is not "auto", "sigmoid" or "softmax".
    """
    if probabilities not in ("auto", "sigmoid", "softmax"):
        raise ValueError(
            f'probabilities must be "auto", "sigmoid" or "softmax", but are {probabilities!r}.'
        )


def is_classifier(logits: Logits) -> bool:
    """Whether there is one prediction per image, not one per pixel."""
    return math.prod(logits.shape[2:]) == 1


def entropy(model: Model, image: Image) -> Scalar:
    """Entropy of the prediction, as in GraTa's fundus experiments (and their TENT).

    GraTa (https://arxiv.org/abs/2408.07343), after TENT (https://arxiv.org/abs/2006.10726). This is
    the one-sided entropy of GraTa's released code. Its maximum is at p = 1/e, not ½, so that pixels
    above 0.368 are pushed towards the foreground. `binary_entropy` is symmetric.

    Raises:
        ValueError: If the model does not return logits [N, C, ...].

    Examples:
        >>> entropy(lambda image: 100 * image, torch.ones(1, 2, 4, 4)).abs() < 1e-5  # certain
        tensor(True)
    """
    return one_sided_entropy(logits_of(model, image))


def binary_entropy(model: Model, image: Image) -> Scalar:
    """Entropy of each class against its complement, summed over classes, averaged over pixels.

    Raises:
        ValueError: If the model does not return logits [N, C, ...].

    Examples:
        >>> binary_entropy(lambda image: -image, torch.zeros(1, 1, 4, 4))
        tensor(0.6931)
    """
    return two_sided_entropy(logits_of(model, image))


def softmax_entropy(model: Model, image: Image) -> Scalar:
    """Entropy of the prediction over classes of which exactly one is right, as in TENT.

    TENT (https://arxiv.org/abs/2006.10726): −Σ_c p_c·log p_c with p = softmax(logits), averaged
    over images, and over positions if there are several. A shift of all logits changes nothing.

    Raises:
        ValueError: If the model does not return logits [N, C, ...] with C > 1.

    Examples:
        >>> softmax_entropy(lambda image: image.mean((2, 3)), torch.zeros(2, 4, 8, 8))  # log 4
        tensor(1.3863)
    """
    return categorical_entropy(logits_of(model, image))


def prediction_entropy(model: Model, image: Image, probabilities: Probabilities = "auto") -> Scalar:
    """The entropy that fits the logits: the default of TENT and GraTa.

    - softmax, by default for logits [N, C] with C > 1: `softmax_entropy`;
    - sigmoid, for dense logits [N, C, ...]: `entropy`, one-sided, as published;
    - sigmoid, for logits [N, C], by default where C = 1: `binary_entropy`. For C = 1 that is the
      softmax entropy of the two logits (z, 0).

    Raises:
        ValueError: If the model does not return logits [N, C, ...].

    Examples:
        >>> image = torch.rand(2, 4, 8, 8)
        >>> classifier = lambda image: image.mean((2, 3))
        >>> prediction_entropy(classifier, image) == softmax_entropy(classifier, image)
        tensor(True)
    """
    logits = logits_of(model, image)
    if resolve_probabilities(probabilities, logits) == "softmax":
        return categorical_entropy(logits)
    return two_sided_entropy(logits) if is_classifier(logits) else one_sided_entropy(logits)


def mean_prediction(
    model: Model,
    image: Image,
    views: Sequence[View] = WEAK_VIEWS,
    probabilities: Probabilities = "sigmoid",
    batched_views: bool = False,
) -> Logits:
    """Probabilities, averaged over views of the image; each prediction is mapped back.

    The result has the shape of the logits. There is one forward pass per view, without gradients.
    Views may differ in shape (a quarter turn of an image that is not square). Logits that have the
    image's axes, [N, C, h, w] at any resolution or as many axes as the image, are mapped back by
    the view's inverse. Other logits, [N, C] or [N, C, T], belong to the whole image, and are
    averaged without a mapping.

    Args:
        model: From images to logits.
        image: [N, channels, *spatial].
        views: Weak views with their inverses.
        probabilities: See `resolve_probabilities`.
        batched_views: Whether all views of one shape take one forward pass; see `logits_of_views`.

    Raises:
        ValueError: If there is no view, if a view does not fit the image, if the model does not
            return logits [N, C, ...], or if pixels lie in one axis, on which views cannot be
            undone.

    Examples:
        >>> image = torch.tensor([[[[0.0, 9.0]]]])
        >>> mean_prediction(lambda x: x, image)  # an equivariant model: all views agree
        tensor([[[[0.5000, 0.9999]]]])
    """
    if not views:
        raise ValueError("at least one view is needed to average predictions.")
    check_views(views, image)
    device = image.device.type
    # Autocast may cache weights that it casts here without gradients, and then silently drop the
    # gradient of the next forward pass (pytorch/pytorch#158232), so its cache is disabled.
    autocast = torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )
    with torch.no_grad(), autocast:
        predicted = functools.partial(_predicted, probabilities=probabilities)
        predictions = logits_of_views(model, image, views, batched_views, predicted)
        return torch.stack(predictions).mean(dim=0)


def _predicted(logits: Tensor, probabilities: Probabilities) -> Tensor:
    if resolve_probabilities(probabilities, logits) == "softmax":
        return log_softmax(logits).exp()
    return torch.sigmoid(at_least_float32(logits))


def has_axes_of(image: Tensor, logits: Tensor) -> bool:
    """Whether the last two axes of logits [N, C, ...] are the image's.

    Raises:
        ValueError: If all pixels lie in one axis.
    """
    if logits.dim() == 3 and image.dim() > 3 and math.prod(image.shape[-2:]) in logits.shape[1:]:
        raise ValueError(
            f"the model returned logits of shape {list(logits.shape)} for images of shape "
            f"{list(image.shape)}: their pixels lie in one axis, on which flips and rotations "
            "cannot be undone. Wrap it in a module that returns [N, C, H, W]."
        )
    return logits.dim() >= min(image.dim(), 4)


class Consistency:
    """Consistency of a strongly augmented image's prediction with the mean over weak views.

    GraTa's pseudo objective (https://arxiv.org/abs/2408.07343):

        q = mean over views of view⁻¹(sigmoid(model(view(x))))         a constant
        loss = BCE(sigmoid(model(minmax(strong(x)))), q)               mean over everything

    With softmax probabilities, for classes of which exactly one is right, the loss is
    −Σ_c q_c·log softmax(...)_c, averaged over the other axes, with q the mean of softmaxes.
    Predictions without the image's axes, such as a classifier's, are not mapped back; see
    `mean_prediction`.

    Cost: one forward pass per view and one with gradients. Every call draws a new augmentation from
    `generator`, also at displaced weights in the same step. The generator is the only state; use
    `load_state_dict` to repeat the same numbers.

    Args:
        views: Weak views with their inverses.
        augmentation: `(image, generator) -> image`, of the same shape.
        generator: The generator of random numbers; by default a new one with seed 0.
        probabilities: "sigmoid", "softmax", or "auto" for the one that fits the logits (see
            `resolve_probabilities`).
        batched_views: Whether views take one forward pass together; see `logits_of_views`.

    Raises:
        ValueError: If `probabilities` has no valid value.

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
        probabilities: Probabilities = "sigmoid",
        batched_views: bool = False,
    ) -> None:
        check_probabilities(probabilities)
        self.probabilities, self.batched_views = probabilities, batched_views
        self.views = tuple(views)
        self.augmentation = StrongAugmentation() if augmentation is None else augmentation
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss on a batch of images [N, channels, *spatial] in [0, 1].

        Raises:
            ValueError: If the augmentation or a view refuses the image, if there is no view, or if
                the model does not return logits [N, C, ...].
        """
        return self.given(model, image, self.draw(image))

    def draw(self, image: Image) -> Image:
        """The strongly augmented images, scaled to [0, 1]; the part with random numbers.

        Raises:
            ValueError: If the augmentation refuses the image.
        """
        strong: Tensor = minmax(self.augmentation(image, self.generator))
        return strong

    def given(self, model: Model, image: Image, strong: Image) -> Scalar:
        """The loss with strongly augmented images at hand.

        Raises:
            ValueError: If a view refuses the image, if there is no view, or if the model does not
                return logits [N, C, ...].
        """
        target = mean_prediction(model, image, self.views, self.probabilities, self.batched_views)
        logits = at_least_float32(logits_of(model, strong))
        if resolve_probabilities(self.probabilities, logits) == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, target)
        log_p = log_softmax(logits)
        log_p = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # 0·∞ otherwise
        return -(target * log_p).sum(dim=1).mean()

    def check_images(self, image: Tensor) -> None:
        """Check that this objective can work with these images.

        Raises:
            ValueError: If it cannot.
        """
        check_views(self.views, image)
        check = getattr(self.augmentation, "check_images", None)
        if check is not None:
            check(image)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the generator's state that `state_dict` returned.

        Raises:
            ValueError: If the entries are not those of `state_dict`.
        """
        if set(state_dict) != {"generator"}:
            raise ValueError(
                'the state of a Consistency has one entry, "generator", but the state to load has '
                f"{sorted(state_dict)}."
            )
        self.generator.set_state(state_dict["generator"].cpu())


def logits_of_views(
    model: Model,
    image: Image,
    views: Sequence[View],
    batched: bool = False,
    predicted: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """The model's logits of each view of the images, mapped back where they have their axes.

    With `batched` there is one forward pass for all views of one shape, and statistics are still
    those of each view: the passes are vectorised (`torch.vmap`), so that the results are those of
    one pass per view up to rounding errors, whatever layers there are. Their activations are in
    memory at the same time. What `torch.vmap` cannot run goes view by view: everything under
    `torch.autocast`, and, with a warning, a model that branches on values, calls `.item()` or draws
    random numbers. A buffer that the forward itself counts up counts one pass.

    Args:
        model: From images to logits.
        image: [N, channels, *spatial].
        views: The views, with their inverses.
        batched: Whether to evaluate views of one shape together.
        predicted: What to make of logits before they are mapped back, elementwise or over classes.

    Raises:
        ValueError: If the model does not return logits [N, C, ...], or if pixels lie in one axis,
            on which views cannot be undone.

    Examples:
        >>> image = torch.tensor([[[[0.0, 9.0]]]])
        >>> for logits in logits_of_views(lambda x: 2 * x, image, WEAK_VIEWS[:2], batched=True):
        ...     logits.flatten()
        tensor([ 0., 18.])
        tensor([ 0., 18.])
    """
    mapped = []
    seen = [view.forward(image) for view in views]
    for view, logits in zip(views, _of_all(model, seen, batched), strict=True):
        made = logits if predicted is None else predicted(logits)
        mapped.append(view.inverse(made) if has_axes_of(image, logits) else made)
    return mapped


def _of_all(model: Model, images: Sequence[Tensor], batched: bool) -> Iterable[Tensor]:
    """The model's logits of each of the images."""
    if batched and len(images) > 1 and not in_autocast(images[0].device):
        try:
            return _of_each_shape(model, images)
        except RuntimeError as error:
            outputs = [logits_of(model, each) for each in images]  # may be the model's own error
            reason = str(error).strip().split("\n")[0]
            warnings.warn(
                f"the model cannot take several views at once ({reason}), so that it took them "
                "one by one; pass batched_views=False",
                stacklevel=caller_level(),
            )
            return outputs
    return (logits_of(model, each) for each in images)


def _of_each_shape(model: Model, images: Sequence[Tensor]) -> list[Tensor]:
    """Logits of all images, with one vectorised pass for each of their shapes."""
    outputs: dict[int, Tensor] = {}
    for shape in {each.shape: None for each in images}:
        chosen = [k for k, each in enumerate(images) if each.shape == shape]
        stacked = torch.stack([images[k] for k in chosen])
        logits = vectorised(lambda each: logits_of(model, each), stacked)
        outputs.update(zip(chosen, logits, strict=True))
    return [outputs[k] for k in range(len(images))]


def logits_of(model: Model, image: Tensor) -> Tensor:
    """The model's logits.

    Raises:
        ValueError: If the output is not of shape [N, C, ...].

    Examples:
        >>> logits_of(torch.nn.Conv2d(3, 2, 1), torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """
    logits = model(image)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or len(logits) != len(image):
        tensor = isinstance(logits, Tensor)
        got = f"shape {list(logits.shape)}" if tensor else type(logits).__name__
        raise ValueError(
            f"the model must return logits [N, C, ...] for images of shape {list(image.shape)}, "
            f"but returned {got}: wrap it in a module that returns its logits only."
        )
    if image.dim() == 4 and logits.shape[1:] == image.shape[2:]:
        raise ValueError(
            f"the model returned logits of shape {list(logits.shape)} for images of shape "
            f"{list(image.shape)}: pixels without an axis of classes. Wrap it in a module that "
            "returns logits.unsqueeze(1), [N, 1, H, W]."
        )
    return logits
