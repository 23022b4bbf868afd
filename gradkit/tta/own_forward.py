"""Taking over the normalisation inside a layer's own forward.

Many layers extend BatchNorm by a `forward` of their own: an activation after it, a cast round it, a
further argument. That forward has to stay; only the call in it that normalises is to be answered
otherwise. A `TorchFunctionMode` finds it, so that it does not matter whether the layer writes
`super().forward(x)`, `F.batch_norm(...)` or `torch.batch_norm(...)`.
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

# What may be done with running statistics on their way to the call that normalises.
_CONVERSIONS = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "detach", "clone"}
    | {"contiguous", "requires_grad_"}
)


@dataclass(frozen=True)
class NormalisationCall:
    """The arguments of one call that normalises.

    Attributes:
        x: What is normalised, [batch, channels, ...].
        mean: The running mean given, [channels], or None.
        var: The running variance given, [channels], or None.
        weight: The scale, [channels], or None.
        bias: The shift, [channels], or None.
        eps: ε.
        by_image: Whether each image is normalised by itself (instance normalisation).
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
    """While it is entered, `normalise` answers the calls by which `layer` normalises.

    A call is the layer's if it is given one of the layer's own tensors, or none at all; those of
    other layers inside it pass. Running statistics that the layer reads in any other way are
    refused: what it computes from them would silently stay the source's.

    Args:
        layer: The layer whose forward runs.
        normalise: From the call to what it returns, of the shape of its `x`.
        refusal: What the error says.

    Attributes:
        calls: How many calls have been answered.

    Raises:
        ValueError: On leaving, if there was no such call; or where the layer computes something
            else from its running statistics, or writes them.

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
        """Answer a call of the layer's; let others pass."""
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
        """Leave; without an error, check that the layer has normalised."""
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]  # torch's
        if kind is None and not self.calls:
            raise ValueError(self._refusal)


@dataclass(frozen=True)
class Adaptation:
    """What an `AdaptedForward` keeps, apart from the layer's own attributes.

    Attributes:
        name: The layer's qualified name in the model.
        statistics: Where mean and variance come from.
        predecessor_type: The class the layer was of.
        forward: A forward that was set on the layer itself, or None.
        answer: From layer, adaptation and call to what the call returns.
    """

    name: str
    statistics: Any
    predecessor_type: type[_NormBase]
    forward: Callable[..., Any] | None
    answer: Callable[[nn.Module, Adaptation, NormalisationCall], Tensor]


class AdaptedForward:
    """What an adapted layer of any class has: its own forward, with other statistics.

    The layer's class becomes a subclass of this one and of its own. Its forward runs, as in
    evaluation mode, and the calls in it that normalise are answered by the statistics.
    """

    _adaptation: Adaptation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns.

        Raises:
            ValueError: If the normalisation in it cannot be found.
        """
        run = self._forward_adapted
        if torch.compiler.is_compiling():  # compiled code does not know of the mode
            run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]  # torch's
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
        """The layer's own line, with the statistics."""
        here: Any = self._adaptation
        return f"{here.predecessor_type.extra_repr(self)}, statistics={here.statistics}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As usual; but the class is made when needed, and cannot be found by its name."""
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
    """The layer itself, not its children, as in evaluation mode."""
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
