"""Mixed statistics that can be trained through, and entropies with a temperature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.tta.adapter import Adapter
from gradkit.tta.objectives import (
    Image,
    Logits,
    Model,
    Scalar,
    is_classifier,
    log_softmax,
    logits_of,
    logits_of_views,
)
from gradkit.tta.statistics import (
    Activations,
    AdaptedBatchNorm,
    PerChannel,
    Statistics,
    at_least_float32,
    source_moments,
    unbiased_moments,
)
from gradkit.tta.views import WEAK_VIEWS, View, check_views

Loss = Literal["gem-t", "gem-skd", "gem-aug"]


class AdaMixBN(Statistics):
    """Test statistics, with scales and shifts rewritten so that they act as a mixture.

    Once per batch each layer measures how far the images are from the source, and mixes:

        d_ab = mean over channels of (μ_a − μ_b)² + (σ_a − σ_b)²       i one image, t all, s source
        λ = mean over images of clip(1 − d_st/(d_st + d_is + d_it), 0, 1)
        μ = λ·μ_s + (1 − λ)·μ_t,   v = λ·v_s + (1 − λ)·v_t
        γ' = γ·√(v_t + ε)/√(v + ε),   β' = β + λ·(μ_t − μ_s)·γ'/√(v_t + ε)

    Normalising by μ_t and v_t with γ' and β' gives what μ and v would with γ and β, but gradients
    flow through the test's statistics. With one image λ is ½. Variances are unbiased.

    The layers' own scales and shifts are written. So they must be trained, since only what is
    trained is reset, and the adapter must be `episodic`.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.TENT(model, statistics=AdaMixBN(), episodic=True)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.statistics.shares
        (torch.Size([1, 2, 8, 8]), {'1': 0.5})
    """

    uses_source: ClassVar[bool] = True

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        # Of a pass that rewrites: each layer's scales and shifts.
        self._written: dict[str, tuple[PerChannel, PerChannel]] | None = None

    def __repr__(self) -> str:
        return "AdaMixBN()"

    @property
    def facts(self) -> dict[str, Any]:
        """The "shares" λ of the source by layer, of the last batch."""
        return {"shares": self.shares}

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """Mean and unbiased variance of `x`."""
        return unbiased_moments(layer.name, x)

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """The layer's output; in the pass that rewrites, with the new scales and shifts."""
        if self._written is None:
            return super().normalise(layer, x)
        if layer.weight is None or layer.bias is None:
            raise ValueError(
                f"layer {layer.name!r} has no scale and shift, which AdaMixBN rewrites; use "
                "gk.tta.Mixed(0.5), which needs none"
            )
        if not (layer.weight.requires_grad and layer.bias.requires_grad):
            raise ValueError(
                f"scale and shift of layer {layer.name!r} are not trained, so that what AdaMixBN "
                "rewrites would not be reset; train them, or use gk.tta.Mixed(0.5)"
            )
        if layer.name in self._written:
            raise ValueError(
                f"layer {layer.name!r} normalises more than once in one pass (it is called twice, "
                "or treats each image by itself, as InstanceNorm does), and its scale can be "
                "rewritten for one of them only: pass single images to InstanceNorm, or use other "
                "statistics, as in gk.tta.TENT(model, statistics=gk.tta.Mixed(0.5))"
            )
        test, source = self.moments(layer, x), source_moments(layer)
        share = source_share(x, test, source)
        (mean, var), (source_mean, source_var) = test, source
        deviation = torch.sqrt(var + layer.eps)
        weight = layer.weight * deviation
        weight = weight / torch.sqrt(share * source_var + (1 - share) * var + layer.eps)
        bias = layer.bias + share * (mean - source_mean) * weight / deviation
        self._written[layer.name] = weight, bias
        self.shares[layer.name] = float(share)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        normal = (x - mean.view(shape)) / deviation.view(shape)
        return (normal * weight.view(shape) + bias.view(shape)).to(x.dtype)

    def observe(self, model: nn.Module, images: Tensor) -> None:
        """Rewrite scales and shifts, layer by layer in one pass."""
        written = self._written = {}
        self.shares = {}
        try:
            model(images)
        finally:
            self._written = None
        layers: dict[str, Any] = dict(model.named_modules())
        for name, (weight, bias) in written.items():
            layers[name].weight.copy_(weight)
            layers[name].bias.copy_(bias)


def source_share(
    x: Activations,
    test: tuple[PerChannel, PerChannel],
    source: tuple[PerChannel, PerChannel],
) -> Float[Tensor, ""]:
    """λ of `AdaMixBN`, the source's share, from activations and (mean, variance) of both.

    Examples:
        >>> x = torch.rand(1, 2, 4, 4)
        >>> var, mean = torch.var_mean(x, dim=(0, 2, 3))
        >>> source_share(x, (mean, var), (torch.zeros(2), torch.ones(2)))
        tensor(0.5000)
    """
    values = at_least_float32(x).flatten(2)
    if values.shape[2] < 2:  # a position for each image has no deviation
        own = values.mean(dim=2), torch.zeros_like(values[:, :, 0])
    else:
        own = values.mean(dim=2), values.std(dim=2)
    there, here = ((mean, var.sqrt()) for mean, var in (source, test))

    def distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return sum((p - q).square().mean(dim=-1) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]  # a tensor: there are two terms

    to_source = distance(here, there)
    total = to_source + distance(own, there) + distance(own, here)
    share = 1 - to_source / torch.where(total > 0, total, 1.0)
    return share.clamp(0, 1).mean()


def nested_classes(logits: Logits) -> Float[Tensor, "batch outcomes *positions"]:
    """Logits of C + 1 exclusive classes, from C sigmoids each of which lies within the one before.

    For optic disc and cup: background, rim and cup. Outcome k has the probability
    p_1·…·p_k·(1 − p_(k+1)), with each p taken as conditional on the one before.

    Examples:
        >>> nested_classes(torch.zeros(1, 2)).exp()
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    z = at_least_float32(logits)
    inside = F.pad(F.logsigmoid(z).movedim(1, -1).cumsum(dim=-1), (1, 0)).movedim(-1, 1)
    outside = F.pad(F.logsigmoid(-z).movedim(1, -1), (0, 1)).movedim(-1, 1)
    return inside + outside


class GEM:
    """Generalised entropy minimisation; see `DomainAdaptor`.

    Args:
        loss: Which of the three.
        classes: From the model's logits to those of exclusive classes [N, K, ...], K > 2; by
            default the logits themselves for a classifier, and `nested_classes` for dense logits.
        views: The views of "gem-aug".
        batched_views: Whether these views take one forward pass together; see
            `gradkit.tta.objectives.logits_of_views`.

    Raises:
        ValueError: If the loss is unknown, or there is no view; in a call, if there are fewer than
            three classes.

    Examples:
        >>> GEM("gem-t")(lambda images: torch.tensor([[0.0, 1.0, 2.0]]), torch.rand(1, 3, 8, 8))
        tensor(4.0808)
    """

    def __init__(
        self,
        loss: Loss = "gem-t",
        classes: Callable[[Tensor], Tensor] | None = None,
        views: Sequence[View] = WEAK_VIEWS,
        batched_views: bool = False,
    ) -> None:
        if loss not in ("gem-t", "gem-skd", "gem-aug"):
            raise ValueError(f"loss is {loss!r}; choose gem-t, gem-skd or gem-aug")
        if not views:
            raise ValueError("views is empty; pass one view at least, such as gk.tta.WEAK_VIEWS[0]")
        self.loss, self.classes, self.views = loss, classes, tuple(views)
        self.batched_views = batched_views

    def check_images(self, images: Tensor) -> None:
        """Check that the views can be applied to these images.

        Raises:
            ValueError: If they cannot.
        """
        if self.loss == "gem-aug":
            check_views(self.views, images)

    def __call__(self, model: Model, image: Image) -> Scalar:
        """The loss."""
        z = self._class_logits(logits_of(model, image))
        z = z - z.mean(dim=1, keepdim=True).detach()
        temperature = 2 * z.detach().std(dim=1, keepdim=True)
        log_q = log_softmax(z / temperature)
        if self.loss == "gem-t":
            target = log_q.exp()
        elif self.loss == "gem-skd":
            target = log_softmax(z.detach()).exp()
        else:
            target = log_softmax(self._mean_logits(model, image)).exp()
        return -(temperature.square() * target * log_q).sum(dim=1).mean()

    def _class_logits(self, logits: Tensor) -> Tensor:
        if self.classes is not None:
            z = self.classes(logits)
        else:
            z = logits if is_classifier(logits) else nested_classes(logits)
        if z.shape[1] < 3:
            raise ValueError(
                f"the logits of shape {list(logits.shape)} stand for {z.shape[1]} classes: with "
                "two, the temperature makes every prediction the same. Pass classes= a function to "
                "logits of at least three exclusive classes."
            )
        return at_least_float32(z)

    def _mean_logits(self, model: Model, image: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = logits_of_views(model, image, self.views, self.batched_views)
            return torch.stack([self._class_logits(each) for each in outputs]).mean(dim=0)


def DomainAdaptor(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-3,
    loss: Loss = "gem-t",
    classes: Callable[[Tensor], Tensor] | None = None,
    views: Sequence[View] = WEAK_VIEWS,
    batched_views: bool = False,
    **options: Any,
) -> Adapter:
    """Test-time adaptation by AdaMixBN and GEM (DomainAdaptor, ICCV 2023).

    [DomainAdaptor: A Novel Approach to Test-time Adaptation](https://arxiv.org/abs/2308.10297):
    `AdaMixBN` mixes statistics and rewrites the scales and shifts φ; then, with logits z centred
    over classes and T = 2·std of z over classes, a constant:

        q = softmax(z/T)
        "gem-t"     L = −T²·Σ q·log q
        "gem-skd"   L = −T²·Σ p·log q       p = softmax(z), a constant
        "gem-aug"   L = −T²·Σ p·log q       p = softmax(mean of z over augmented images), a constant
        φ ← φ − lr·∇L                       one step of SGD, anew for each batch
        predict x with φ

    L is averaged over images and positions. Two classes do not work: their q is 0.67 whatever z is.
    So dense logits of nested sigmoids, such as disc and cup, stand for background, rim and cup (see
    `nested_classes`); for others pass `classes`. "gem-aug" takes the weak views. The authors'
    learning rate is not known here.

    Cost: 3 forward passes and 1 backward pass per batch; "gem-aug" 6 more forward passes. State:
    none.

    Args:
        model: The source model; see `Adapter`.
        lr: The learning rate of SGD, without momentum.
        loss: Which loss.
        classes: From the model's logits to those of at least three exclusive classes.
        views: The views of "gem-aug".
        batched_views: Whether these views are evaluated together, with each one's own statistics.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        ValueError: If an argument has no valid value, or if the model has no BatchNorm with running
            statistics; in a call, if there are two classes, or if a BatchNorm has no scale.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.DomainAdaptor(model)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """
    check_number("lr", lr, least=0)
    if not options.get("episodic", True):
        raise ValueError(
            "episodic is False, but AdaMixBN rewrites the scales of the source model, so that it "
            "needs them anew for each batch; leave episodic out"
        )
    return Adapter(
        model,
        statistics=AdaMixBN(),
        objectives={"loss": GEM(loss, classes, views, batched_views)},
        **{
            "optimizer": functools.partial(torch.optim.SGD, lr=lr),
            "episodic": True,
            **options,
        },
    )
