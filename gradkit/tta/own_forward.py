"""Interception of the normalisation inside a layer's own forward.

Many layers extend BatchNorm by their own `forward`: an activation after it, a cast around it, a
further argument. That forward must still run; only the call in it that normalises is replaced. A
`TorchFunctionMode` finds this call, whether the layer writes `super().forward(x)`,
`F.batch_norm(...)` or `torch.batch_norm(...)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

# Operations that are allowed on running statistics before the call that normalises.
_CONVERSIONS = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "clone"}
    | {"contiguous", "requires_grad_"}
)


@dataclass(frozen=True)
class NormalisationCall:
    """The arguments of one call that normalises.

    Attributes:
        x: The input, [batch, channels, ...].
        mean: The running mean, [channels], or None.
        var: The running variance, [channels], or None.
        weight: The scale, [channels], or None.
        bias: The shift, [channels], or None.
        eps: ε.
        by_image: Whether each image is normalised separately (instance normalisation).
    """

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    by_image: bool = False


def _functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormalisationCall:
    return NormalisationCall(input, running_mean, running_var, weight, bias, eps)


def _builtin(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> NormalisationCall:
    return NormalisationCall(input, running_mean, running_var, weight, bias, eps)


def _instance(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormalisationCall:
    return NormalisationCall(input, running_mean, running_var, weight, bias, eps, by_image=True)


_NORMALISING: dict[Any, Callable[..., NormalisationCall]] = {
    F.batch_norm: _functional,
    torch.batch_norm: _builtin,
    F.instance_norm: _instance,
}


class NormalisationInterceptor(TorchFunctionMode):
    """A context in which `normalise` replaces the calls that normalise in `layer`.

    A call belongs to the layer if one of its arguments is a tensor of the layer, or if it has no
    tensor arguments besides the input. Calls of other layers inside it are not changed. Other uses
    of the layer's running statistics raise, since their results would silently depend on the
    source's statistics.

    Args:
        layer: The layer whose forward runs.
        normalise: The function from a call to its result, of the shape of its `x`.
        refusal: The error message.

    Attributes:
        calls: The number of calls that have been replaced.

    Raises:
        ValueError: At the end of the context, if there was no such call; or when the layer computes
            something else from its running statistics, or writes to them.

    Examples:
        >>> layer = nn.BatchNorm1d(2).eval()
        >>> with NormalisationInterceptor(layer, lambda call: -call.x, "does not normalise"):
        ...     layer(torch.ones(1, 2))
        tensor([[-1., -1.]])
    """

    def __init__(
        self,
        layer: nn.Module,
        normalise: Callable[[NormalisationCall], Tensor],
        refusal: str,
    ) -> None:
        super().__init__()
        self.calls = 0
        self._normalise = normalise
        self._refusal = refusal
        buffers = dict(layer.named_buffers(recurse=False))
        self._own = [*layer.parameters(recurse=False), *buffers.values()]
        self._statistics = [
            buffers[name] for name in ("running_mean", "running_var") if name in buffers
        ]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace a call of the layer; run all other calls."""
        kwargs = kwargs or {}
        read_call = _NORMALISING.get(func)
        if read_call is not None:
            call = read_call(*args, **kwargs)
            given = [t for t in (call.mean, call.var, call.weight, call.bias) if t is not None]
            if not given or _meet(given, self._own + self._statistics):
                self.calls += 1
                return self._normalise(call)
        if not _meet(_tensors((args, kwargs)), self._statistics):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name not in _CONVERSIONS:
            raise ValueError(self._refusal)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if name not in _CONVERSIONS:
                raise ValueError(self._refusal)
            self._statistics.append(result)
        return result  # a shape or a dtype, for example

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """End the context; without an error, check that the layer has normalised."""
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]  # untyped in torch
        if kind is None and not self.calls:
            raise ValueError(self._refusal)


@dataclass(frozen=True)
class Adaptation:
    """The attributes of an `AdaptedForward`, apart from the layer's own.

    Attributes:
        name: The layer's qualified name in the model.
        statistics: Where mean and variance come from.
        predecessor_type: The original class of the layer.
        forward: A forward that was set on the layer itself, or None.
        answer: The function from layer, adaptation and call to the call's result.
    """

    name: str
    statistics: Any
    predecessor_type: type[_NormBase]
    forward: Callable[..., Any] | None
    answer: Callable[[nn.Module, Adaptation, NormalisationCall], Tensor]


class AdaptedForward:
    """Base class for adapted layers of any class, which keep their own forward.

    The layer's class becomes a subclass of this class and of its original one. Its forward runs as
    in evaluation mode, and the calls in it that normalise use the statistics.
    """

    _adaptation: Adaptation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward with the statistics.

        Raises:
            ValueError: If the normalisation in it cannot be found.
        """
        run = self._forward_adapted
        if torch.compiler.is_compiling():  # compiled code ignores the mode
            run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]  # untyped in torch
        return run(*args, **kwargs)

    def _forward_adapted(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, _NormBase)
        here = self._adaptation
        own = here.forward or functools.partial(here.predecessor_type.forward, self)
        refusal = (
            f"layer {here.name!r} is a {here.predecessor_type.__name__}, whose own forward does "
            "not normalise by torch.nn.functional.batch_norm alone, so that mean and variance "
            f"cannot come from {here.statistics}: let it call super().forward or F.batch_norm "
            "with its running statistics, put a plain BatchNorm and a layer of its own in its "
            'place, or use statistics="source", which exchanges nothing.'
        )
        answer = functools.partial(here.answer, self, here)
        with _in_evaluation_mode(self), NormalisationInterceptor(self, answer, refusal):
            return own(*args, **kwargs)

    def extra_repr(self) -> str:
        """The layer's own text, with the statistics."""
        here: Any = self._adaptation
        return f"{here.predecessor_type.extra_repr(self)}, statistics={here.statistics}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As usual, except that the class is generated and cannot be found by its name."""
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _blank, (self._adaptation.predecessor_type,), *reduced[2:]


@functools.cache
def adapted_type(kind: Any) -> Any:
    """The class of layers like `kind`, a class of normalisation layers, with an `AdaptedForward`.

    Examples:
        >>> adapted_type(nn.InstanceNorm2d)
        <class 'gradkit.tta.own_forward.AdaptedInstanceNorm2d'>
    """
    return type(f"Adapted{kind.__name__}", (AdaptedForward, kind), {"__module__": __name__})


def _blank(kind: Any) -> Any:
    """An empty layer of the adapted class of `kind`, for copy and pickle to fill."""
    adapted = adapted_type(kind)
    return adapted.__new__(adapted)


@contextmanager
def _in_evaluation_mode(layer: nn.Module) -> Iterator[None]:
    """A context in which the layer, but not its children, is in evaluation mode."""
    training, layer.training = layer.training, False
    try:
        yield
    finally:
        layer.training = training


def _meet(some: Iterable[Tensor], others: list[Tensor]) -> bool:
    return any(one is other for one in some for other in others)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
