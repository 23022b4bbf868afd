"""Sources of BatchNorm's mean and variance for a trained model on a new domain.

A BatchNorm layer computes y = γ·(x − μ)/√(v + ε) + β per channel. After training, μ and v are the
source domain's running statistics. On data of another domain they are wrong, and test-time
adaptation has to choose other ones. Here that choice is an object, a `Statistics`, and
`install_statistics` makes every BatchNorm of a model use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from gradkit.tta.own_forward import Adaptation, AdaptedForward, NormalisationCall, adapted_type

Activations = Float[Tensor, "batch channels *spatial"]
PerChannel = Float[Tensor, " channels"]


def batch_moments(x: Activations) -> tuple[PerChannel, PerChannel]:
    """Mean and biased variance of each channel over the batch and all positions.

    Half-precision activations are reduced in float32, as in BatchNorm. Differentiable.

    Examples:
        >>> mean, var = batch_moments(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]))
        >>> mean.item(), var.item()
        (4.0, 5.0)
    """
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(at_least_float32(x), dim=dims, correction=0)
    return mean, var


def normalise_with(
    x: Activations,
    mean: PerChannel,
    var: PerChannel,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    eps: float = 1e-5,
) -> Activations:
    """γ·(x − μ)/√(v + ε) + β, differentiable in every argument, μ and v included.

    BatchNorm's own kernel treats given statistics as constants, so use this for statistics that
    depend on the input. The layer is reduced to one scale and one shift per channel, which takes
    one pass over `x`. The result is computed in the widest dtype of the arguments and returned in
    that of `x`.

    Examples:
        >>> x = torch.tensor([[[1.0, 3.0]]])
        >>> normalise_with(x, torch.tensor([2.0]), torch.tensor([4.0]), eps=0.0)
        tensor([[[-0.5000,  0.5000]]])
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)


def source_moments(layer: AdaptedBatchNorm) -> tuple[PerChannel, PerChannel]:
    """The layer's running mean and variance from training.

    Raises:
        ValueError: If the layer was built with `track_running_stats=False` and has none.

    Examples:
        >>> layer = install_statistics(nn.BatchNorm1d(2), "source")
        >>> source_moments(layer)
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise ValueError(_no_source(layer.name))
    return at_least_float32(mean), at_least_float32(var)


class Statistics:
    """Base class for sources of mean and variance for BatchNorm layers.

    One object serves all layers of a model. A subclass that keeps statistics per layer uses
    `layer.name`, the qualified name in the model, as a key. The object is called in every forward
    pass, including those of augmented images and at displaced weights. A stateless subclass defines
    `moments` only. Override `normalise` to use a fused kernel or another gradient. A stateful
    subclass also defines `reset`, `state_dict` and `load_state_dict`, with tensors and plain values
    only, so that `torch.load(..., weights_only=True)` can read them.

    Attributes:
        uses_source: Whether running statistics are needed. A layer without any is then refused when
            the statistics are installed, not at the first image.

    Examples:
        The median instead of the mean, as in MedBN (https://arxiv.org/abs/2403.19326):

        >>> class Median(Statistics):
        ...     def moments(self, layer, x):
        ...         median = x.transpose(0, 1).flatten(1).median(dim=1).values
        ...         shape = (1, -1) + (1,) * (x.dim() - 2)
        ...         return median, batch_moments((x - median.view(shape)).square())[0]
        >>> model = install_statistics(nn.Sequential(nn.BatchNorm1d(1)), Median())
        >>> model(torch.tensor([[[0.0, 1.0, 5.0]]])).median().item()
        0.0
    """

    uses_source: ClassVar[bool] = False

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The mean and variance with which `layer` normalises `x`, each [channels].

        Raises:
            NotImplementedError: If a subclass does not define this method.
        """
        raise NotImplementedError(f"{type(self).__name__} must define moments(layer, x)")

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """The layer's output: `x` normalised by `moments`, then scaled by γ and shifted by β."""
        mean, var = self.moments(layer, x)
        return normalise_with(x, mean, var, layer.weight, layer.bias, layer.eps)

    def observe(self, model: nn.Module, images: Tensor) -> None:
        """Learn from a batch, in statistics that keep state; nothing by default.

        An adapter calls it once per batch, before the step and without gradients. After that,
        `moments` only reads the state, however often the model is evaluated.
        """

    @property
    def learns(self) -> bool:
        """Whether they depend on earlier batches, so that several images cannot share them."""
        return type(self).observe is not Statistics.observe or bool(self.state_dict())

    def reset(self) -> None:
        """Clear the state; does nothing unless a subclass keeps state."""

    def state_dict(self) -> dict[str, Any]:
        """The state; empty unless a subclass keeps state."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If there are entries, but these statistics keep no state.
        """
        if state_dict:
            raise ValueError(
                f"{type(self).__name__} keeps no state, but the state to load has "
                f"{sorted(state_dict)}: it was saved from other statistics."
            )


class CountingStatistics(Statistics):
    """Base class for statistics whose only state of their own is the number of batches.

    Attributes:
        k: The number of batches so far.
    """

    k = 0

    def reset(self) -> None:
        self.k = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of batches."""
        return {"k": self.k}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.k = state_dict["k"]


@dataclass(frozen=True)
class SourceStatistics(Statistics):
    """The running statistics, with the same results and cost as in evaluation mode.

    Examples:
        >>> bn = nn.BatchNorm1d(2).eval()
        >>> x = torch.randn(3, 2)
        >>> torch.equal(install_statistics(nn.BatchNorm1d(2), SourceStatistics())(x), bn(x))
        True
    """

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The layer's running mean and variance, independent of `x`."""
        return source_moments(layer)

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """BatchNorm in evaluation mode.

        A layer built with `track_running_stats=False` then normalises by the batch.
        """
        mean, var = layer.running_mean, layer.running_var
        training = mean is None and var is None
        return F.batch_norm(
            x, mean, var, layer.weight, layer.bias, training, momentum=0.0, eps=layer.eps
        )


@dataclass(frozen=True)
class BatchStatistics(Statistics):
    """The current batch's mean and biased variance; running statistics are not used.

    As in TENT (https://arxiv.org/abs/2006.10726) and prediction-time BatchNorm
    (https://arxiv.org/abs/2006.10963). Uses BatchNorm's training kernel, at the same cost. Under
    data parallelism each process has its own statistics.

    Examples:
        >>> layer = install_statistics(nn.BatchNorm1d(1), BatchStatistics())
        >>> layer(torch.tensor([[1.0], [3.0]])).detach().flatten()
        tensor([-1.0000,  1.0000])
    """

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """Mean and biased variance of `x`."""
        return batch_moments(x)

    def normalise(self, layer: AdaptedBatchNorm, x: Activations) -> Activations:
        """BatchNorm's training kernel.

        Raises:
            ValueError: If a channel has fewer than two values, so that its variance is meaningless.
        """
        if x.numel() < 2 * x.shape[1]:
            raise ValueError(
                f"layer {layer.name!r} got an input of shape {list(x.shape)}: the test "
                "batch's statistics need at least 2 values a channel. Use a larger batch or image, "
                'or "source" or Mixed statistics.'
            )
        return F.batch_norm(
            x, None, None, layer.weight, layer.bias, training=True, momentum=0.0, eps=layer.eps
        )


@dataclass(frozen=True)
class Mixed(Statistics):
    """A fixed blend of source and test statistics, as in DIGA.

    "Dynamically Instance-Guided Adaptation" (CVPR 2023,
    https://doi.org/10.1109/CVPR52729.2023.02307): μ = a·μs + (1 − a)·μt and
    v = a·vs + (1 − a)·vt with the biased vt of the current batch. Gradients flow through μt and vt,
    as with `"test"` statistics. A single value per channel is allowed (vt = 0).

    Args:
        share: a, the source's share, in [0, 1]. 0.8 is DIGA's value.

    Raises:
        ValueError: If `share` is outside [0, 1].

    Examples:
        >>> layer = install_statistics(nn.BatchNorm1d(1), Mixed(0.8))
        >>> mean, var = layer.statistics.moments(layer, torch.tensor([[10.0], [20.0]]))
        >>> round(mean.item(), 4), round(var.item(), 4)  # source: 0 and 1; batch: 15 and 25
        (3.0, 5.8)
    """

    share: float = 0.8
    uses_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"the source's share must lie in [0, 1], but is {self.share}.")

    def moments(self, layer: AdaptedBatchNorm, x: Activations) -> tuple[PerChannel, PerChannel]:
        """The blend of `source_moments(layer)` and `batch_moments(x)`."""
        source_mean, source_var = source_moments(layer)
        mean, var = batch_moments(x)
        a = self.share
        return a * source_mean + (1 - a) * mean, a * source_var + (1 - a) * var


class AdaptedBatchNorm(_BatchNorm):
    """A BatchNorm whose mean and variance come from `statistics`; see `install_statistics`.

    It is the original layer object with another class: parameters, buffers, hooks and state-dict
    names are kept, and references to the layer stay valid. It behaves in the same way in training
    and evaluation mode, and never writes the running statistics itself.

    Layers of other classes become an `AdaptedForward`; for them, statistics get an
    `AdaptedBatchNorm` with the same name, buffers and settings.

    Attributes:
        name: The qualified name in the model, "" if the layer is the whole model. A layer that is
            used at several places has its first name.
        statistics: Where mean and variance come from.
        predecessor_type: The original class.
    """

    name: str
    statistics: Statistics
    predecessor_type: type[_NormBase]

    def forward(self, x: Activations) -> Activations:
        """Normalise [batch, channels, ...] by the chosen statistics."""
        self.predecessor_type._check_input_dim(self, x)  # type: ignore[no-untyped-call]  # untyped in torch
        return self.statistics.normalise(self, x)

    def keep(self, mean: PerChannel, var: PerChannel) -> None:
        """Write the layer's running mean and variance, for statistics that move them."""
        layer = vars(self).get("called_by", self)
        with torch.no_grad():
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

    def extra_repr(self) -> str:
        """BatchNorm's own text, with the statistics."""
        line = super().extra_repr()  # type: ignore[no-untyped-call]  # untyped in torch
        return f"{line}, statistics={self.statistics}"


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _answer(layer: nn.Module, adaptation: Adaptation, call: NormalisationCall) -> Tensor:
    """The result of a call that normalises, with the adaptation's statistics."""
    called = AdaptedBatchNorm.__new__(AdaptedBatchNorm)
    vars(called).update(
        vars(layer),
        _parameters={"weight": call.weight, "bias": call.bias},
        _buffers={"running_mean": call.mean, "running_var": call.var},
        eps=call.eps,
        called_by=layer,  # the call's buffers may be converted copies of the layer's
        name=adaptation.name,
        statistics=adaptation.statistics,
        predecessor_type=adaptation.predecessor_type,
    )
    batches = torch.split(call.x, 1) if call.by_image and len(call.x) else (call.x,)
    normalised = [called.statistics.normalise(called, batch) for batch in batches]
    return normalised[0] if len(normalised) == 1 else torch.cat(normalised)


def statistics_of(layer: nn.Module) -> Statistics | None:
    """Where a layer takes mean and variance; None if it was not adapted.

    Examples:
        >>> statistics_of(install_statistics(nn.BatchNorm1d(2), Mixed(0.8)))
        Mixed(share=0.8)
    """
    if isinstance(layer, AdaptedForward):
        layer = layer._adaptation  # type: ignore[assignment]  # has the same attribute
    found = getattr(layer, "statistics", None)
    return found if isinstance(found, Statistics) else None


def check_variance(name: str, x: Activations) -> None:
    """Check that the variance of a layer's input can be estimated without bias.

    Raises:
        ValueError: If a channel has fewer than two values.
    """
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(
            f"layer {name!r} got an input of shape {list(x.shape)}: the variance of a "
            "batch needs at least 2 values a channel. Use a larger batch or image."
        )


def unbiased_moments(name: str, x: Activations) -> tuple[PerChannel, PerChannel]:
    """Mean and unbiased variance of each channel of a layer's input.

    Raises:
        ValueError: If a channel has fewer than two values.

    Examples:
        >>> unbiased_moments("norm", torch.tensor([[1.0], [3.0]]))
        (tensor([2.]), tensor([2.]))
    """
    check_variance(name, x)
    dims = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(at_least_float32(x), dim=dims, correction=1)
    return mean, var


def resolve_statistics(statistics: str | Statistics) -> Statistics:
    """The `Statistics` for "source", "test", or a `Statistics` itself.

    Raises:
        ValueError: If the argument is none of these.

    Examples:
        >>> resolve_statistics("test"), resolve_statistics(Mixed(0.5))
        (BatchStatistics(), Mixed(share=0.5))
    """
    if isinstance(statistics, Statistics):
        return statistics
    if statistics == "source":
        return SourceStatistics()
    if statistics == "test":
        return BatchStatistics()
    raise ValueError(
        f'statistics must be "source", "test" or a Statistics such as Mixed(0.8), '
        f"but are {statistics!r}."
    )


def install_statistics(model: nn.Module, statistics: str | Statistics) -> nn.Module:
    """Make every BatchNorm in `model` take mean and variance from `statistics`, in place.

    Each BatchNorm (1d, 2d, 3d and synchronised) becomes an `AdaptedBatchNorm`. Parameters, buffers,
    their names, hooks and the tying of layers are kept. Installing again replaces the statistics.

    Subclasses keep their own forward, with an activation, a cast or a further argument. It runs as
    in evaluation mode, and `statistics` replace the calls of `F.batch_norm` in it, such as that of
    `super().forward`. The same holds for parametrised layers, and for InstanceNorm with running
    statistics, where each image is treated as a batch. With the source's statistics nothing is
    replaced, and all of these layers are not changed.

    Other layers, including dropout and InstanceNorm without running statistics, still follow
    `model.training`.

    Args:
        model: The model, which is changed in place.
        statistics: "source", "test" or a `Statistics`.

    Returns:
        The model.

    Raises:
        ValueError: If the statistics are not the source's and the model has no BatchNorm, or a
            layer whose running statistics cannot be replaced (a scripted BatchNorm, a frozen one
            that is not a `torch.nn` layer); if a layer has no running statistics but they are
            needed; or if a lazy layer is not yet initialised. The model is then unchanged. A
            subclass whose forward does not call `F.batch_norm`, or computes something else from its
            running statistics, raises when it is first called.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> model = install_statistics(model, "test")
        >>> model[1].name, list(model.state_dict())[2:]
        ('1', ['1.weight', '1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked'])

        >>> class BatchNormAct(nn.BatchNorm1d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> layer = install_statistics(BatchNormAct(1), "test")
        >>> layer(torch.tensor([[1.0], [3.0]])).detach().flatten()
        tensor([0.0000, 1.0000])
        >>> isinstance(layer, BatchNormAct)
        True
    """
    resolved = resolve_statistics(statistics)
    from_source = type(resolved) is SourceStatistics
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, _NormBase)
        and (isinstance(layer, _BatchNorm) or layer.running_mean is not None)
    ]
    if not from_source:
        _check_exchangeable(model, resolved)
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no BatchNorm layer, so {resolved} would change "
                'nothing: use statistics="source", or another method if it takes no statistics. '
                "(Scripted or exported models hide their layers.)"
            )
    for name, layer in layers:
        _check_adaptable(layer, name, resolved)
    for name, layer in layers:
        _adapt(layer, name, resolved, exchange=not from_source)
    return model


def require_running_statistics(model: nn.Module, method: str) -> None:
    """Check that a method that cannot do without running statistics finds some in the model.

    Raises:
        ValueError: If no layer has any.

    Examples:
        >>> require_running_statistics(nn.BatchNorm1d(2), "PASS")
    """
    if not any(name.split(".")[-1] == "running_mean" for name, _ in model.named_buffers()):
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm with running statistics, which {method} "
            "needs: use a method that can do without, such as TENT with "
            'statistics="source"'
        )


def _check_exchangeable(model: nn.Module, statistics: Statistics) -> None:
    """Check that no layer outside torch.nn normalises by running statistics.

    Raises:
        ValueError: If one does.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase):
            continue
        tensors = {
            name
            for named in (layer.named_parameters, layer.named_buffers)
            for name, _ in named(recurse=False)
        }
        scripted = isinstance(layer, torch.jit.ScriptModule)
        if {"running_mean", "running_var"} <= tensors and (scripted or "weight" in tensors):
            kind = getattr(layer, "original_name", type(layer).__name__)
            how = "scripted" if scripted else "no layer of torch.nn"
            raise ValueError(
                f"layer {name!r} is a {kind} with running statistics, but {how}, so that mean and "
                f"variance cannot come from {statistics}: put a torch.nn.BatchNorm with its "
                "parameters and buffers in its place (script the model after adaptation), or use "
                'statistics="source".'
            )


def _check_adaptable(layer: _NormBase, name: str, statistics: Statistics) -> None:
    """Check that `layer` can be adapted.

    Raises:
        ValueError: If it cannot.
    """
    if any(is_lazy(p) for p in layer.parameters(recurse=False)):
        raise ValueError(
            f"BatchNorm layer {name!r} is lazy and not yet initialised: run the model on one batch "
            "first."
        )
    if statistics.uses_source and layer.running_mean is None:
        raise ValueError(_no_source(name))


def _adapt(layer: _NormBase, name: str, statistics: Statistics, *, exchange: bool) -> None:
    """Make `layer` take mean and variance from `statistics`, or restore its original class."""
    # The layer object itself is changed, since forward may use it by a list or attribute that torch
    # does not track. `vars` instead of setattr, since statistics that are a module would become a
    # child of the layer.
    attributes = vars(layer)
    if isinstance(layer, AdaptedBatchNorm):
        _become(layer, layer.predecessor_type)
        for attribute in ("name", "statistics", "predecessor_type"):
            del attributes[attribute]
    elif isinstance(layer, AdaptedForward):
        before = attributes.pop("_adaptation")
        _become(layer, before.predecessor_type)
        if before.forward is not None:
            attributes["forward"] = before.forward
    kind: Any = type(layer)
    if kind in _PLAIN and "forward" not in attributes:
        attributes.update(name=name, statistics=statistics, predecessor_type=kind)
        _become(layer, AdaptedBatchNorm)
    elif exchange:
        own = attributes.pop("forward", None)
        attributes["_adaptation"] = Adaptation(name, statistics, kind, own, _answer)
        _become(layer, adapted_type(kind))


def _become(layer: Any, kind: Any) -> None:
    layer.__class__ = kind


def _no_source(name: str) -> str:
    return (
        f"BatchNorm layer {name!r} has no running statistics (it was built with "
        f'track_running_stats=False), so there is nothing to take from the source: use "test".'
    )


def norm_affine_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and shifts (weight, bias) of all normalisation layers, by their names in the model.

    These are affine batch, instance, layer, group and RMS normalisation, and their subclasses. For
    a parametrised scale or shift, they are its originals. A parameter that is used at several
    places appears once, under its name in `model.named_parameters()`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2))
        >>> list(norm_affine_parameters(model))
        ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    places = (
        "weight",
        "bias",
        "parametrizations.weight.original",
        "parametrizations.bias.original",
    )
    chosen = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, kinds)
        for name, parameter in layer.named_parameters()
        if name.rstrip("0123456789") in places
    }
    return {name: p for name, p in model.named_parameters() if id(p) in chosen}


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor, in float32 if its precision is lower.

    Examples:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
