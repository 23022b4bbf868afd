"""The objectives of a step: their checks, and those of losses, graphs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]
Objectives = Closure | Mapping[str, Closure]

LOSS = "loss"
"""The name of a single, unnamed objective."""


class NoGradientError(RuntimeError):
    """A closure produced no gradient.

    Attributes:
        loss: The loss that it returned; None if it returned none.
    """

    def __init__(self, message: str, loss: Tensor | None = None) -> None:
        super().__init__(message)
        self.loss = loss


class NoLossError(NoGradientError, ValueError):
    """A closure returned a mapping without losses."""


def check_objectives(objectives: object) -> None:
    """Check the objectives passed to `step`.

    Raises:
        TypeError: If they are neither a callable nor a mapping from names to callables.
        ValueError: If the mapping is empty.
    """
    if isinstance(objectives, Mapping):
        if not objectives:
            raise ValueError("the mapping of objectives is empty; give it one closure per name")
        for name, closure in objectives.items():
            if not isinstance(name, str):
                raise TypeError(f"the name of an objective is {name!r}; names are strings")
            if not callable(closure):
                raise TypeError(
                    f"objective {name!r} is a {type(closure).__name__}, not a closure; pass a "
                    "function that runs the model and returns the loss, so that it can be "
                    f'evaluated again: {{"{name}": lambda: criterion(model(x), y)}}'
                )
    elif isinstance(objectives, (list, tuple)):
        raise TypeError(
            f"step() takes a closure or a mapping of closures, not a {type(objectives).__name__}; "
            'give each objective a name: step({"a": first, "b": second})'
        )
    elif isinstance(objectives, Generator):
        raise TypeError(
            "step() takes a closure or a mapping of closures, not a generator; pass the generator "
            "function itself, without calling it, since it may have to run again"
        )
    elif not callable(objectives):
        raise TypeError(
            f"step() takes a closure or a mapping of closures, not a {type(objectives).__name__}; "
            "pass a function that runs the model and returns the loss: "
            "step(lambda: criterion(model(x), y))"
        )


def micro_batches(returned: object) -> AbstractContextManager[Iterable[Any]]:
    """A context with the micro-batches of a closure.

    They are what it returned, or what its generator yields, which is closed at the end.
    """
    return closing(returned) if isinstance(returned, Generator) else nullcontext((returned,))


def checked_loss(loss: object, name: str) -> Tensor | None:
    """The loss as a 0-d tensor; None stays None.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is not a real scalar, or is on the meta device.
    """
    if loss is None:
        return None
    if isinstance(loss, (list, tuple)):
        raise TypeError(
            f"objective {name!r} returned a {type(loss).__name__}; return one loss as a tensor, or "
            'several as a mapping from their names: {"a": first, "b": second}'
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"objective {name!r} returned a {type(loss).__name__}; return the loss as a tensor"
        )
    loss = as_plain(loss)
    if loss.numel() != 1:
        raise ValueError(
            f"objective {name!r} returned a tensor of shape {tuple(loss.shape)}; "
            "a loss is one number: take its mean() or sum()"
        )
    if not loss.is_floating_point():
        raise ValueError(
            f"objective {name!r} returned a loss of dtype {loss.dtype}; it must be a real "
            "floating-point number"
        )
    if loss.is_meta:
        raise ValueError(
            f"objective {name!r} returned a loss on the meta device, which holds no number; "
            "compute it on the device of the parameters"
        )
    return loss.reshape(()) if loss.dim() else loss


# Not part of torch's public interface.
_next_number: Callable[[], int] | None = getattr(torch._C._autograd, "_get_sequence_nr", None)


@functools.cache
def _probe() -> Tensor:
    return torch.zeros((), requires_grad=True, device="cpu")


def _sequence_number() -> int:
    """A number that is above those of all autograd nodes of this thread so far."""
    if _next_number is not None:
        return _next_number()
    with torch.enable_grad():
        node: Any = _probe().clone().grad_fn
    number: int = node._sequence_nr()
    return number


OVER = "_gradkit_over"
"""The attribute of leaves that were copies for an evaluation which is over."""


class GraphCheck:
    """A search of the graphs that a closure makes from now on, which visits each node once.

    Args:
        leaves: The tensors to differentiate with respect to; None to look for `known` only.
        known: What an earlier evaluation has found as `outside`.
        displaced: Whether the weights are displaced, so that a node from outside is an error at
            once. Nodes are told apart by sequence numbers, which each thread counts for itself, so
            that those of other threads (a forward pass in a thread, a double backward pass on an
            accelerator) may look old. They are then recognised by their leaves' accumulators, which
            are new unless an older graph keeps them.
        copied: Whether the leaves are copies for one evaluation, so that those of others are none.

    Attributes:
        outside: The mark of a node from before the closure ran through which a loss depends on a
            leaf; None if none was found. Such a loss would be the same at other weights.
        is_older: Whether a node from before the closure ran was found.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor] | None = None,
        known: Any = None,
        *,
        displaced: bool = False,
        copied: bool = False,
    ) -> None:
        self.outside: Any = None
        self._copied = copied
        self._known = known
        self._mark: object | None = None
        if displaced and leaves is not None:
            self._mark = object()
            _mark_accumulators(leaves, self._mark)
        self._leaves = leaves
        # Above those of all autograd nodes so far.
        self._now = _sequence_number()
        self._begin = 0 if leaves is None else self._now
        self.is_older = False
        self._seen: set[object] = set()

    @functools.cached_property
    def _ids(self) -> set[int]:
        return set(map(id, self._leaves or ()))

    def forget(self) -> None:
        """Drop the references to the nodes that have been visited."""
        self._seen.clear()

    def close(self) -> None:
        """Drop the references to nodes and leaves; nothing is visited afterwards."""
        self._seen.clear()
        self._leaves = None

    def visit(self, loss: Tensor, name: str, *, differentiated: bool = False) -> None:
        """Search a loss's graph.

        A reentrant checkpoint calls backward inside its own backward. Where gradients are computed
        with respect to given tensors only, it is skipped, and its parameters would silently not be
        trained.

        Args:
            loss: The loss, at the root of the graph.
            name: The objective's name.
            differentiated: Whether the closure has called backward itself.

        Raises:
            RuntimeError: If a graph that is still to be differentiated has a reentrant checkpoint,
                or if it reaches a leaf of another evaluation.
        """
        seen, now = self._seen, self._now
        ahead = [] if loss.grad_fn in seen else [loss.grad_fn]
        while ahead:
            node: Any = ahead.pop()
            if node is None:
                continue
            kind = type(node).__name__
            if kind == "AccumulateGrad":  # a leaf, where the graph ends
                if self._copied and hasattr(node.variable, OVER):
                    raise RuntimeError(kept_from_before(name))
                continue
            if not differentiated and "CheckpointFunction" in kind:
                raise RuntimeError(
                    f"objective {name!r} uses torch.utils.checkpoint with use_reentrant=True, "
                    "which hides parameters from the gradient; pass use_reentrant=False"
                )
            if self._known is not None and node.metadata.get(_OUTSIDE) is self._known:
                self.outside = self._known
            number, old = node._sequence_nr(), False
            if number < now:
                self.is_older = True
                old = self.outside is None and number < self._begin
            for following, _ in node.next_functions:
                if old and self._is_leaf_from_before(following):
                    self.outside = node.metadata[_OUTSIDE] = object()
                if following not in seen:
                    seen.add(following)
                    ahead.append(following)

    def _is_leaf_from_before(self, node: Any) -> bool:
        """Whether a node accumulates a leaf's gradient, and may have existed before the closure."""
        if id(getattr(node, "variable", None)) not in self._ids:
            return False
        return self._mark is None or node.metadata.get(_EXISTED) is self._mark


# Keys of nodes' metadata: a reference to a node would keep its graph alive.
_EXISTED, _OUTSIDE = "gradkit.existed", "gradkit.outside"


def _mark_accumulators(leaves: Sequence[Tensor], mark: object) -> None:
    """Mark the nodes that accumulate the leaves' gradients, where graphs keep them alive."""
    with torch.enable_grad():
        for leaf in leaves:
            if leaf.requires_grad:
                node: Any = leaf.view_as(leaf).grad_fn
                node.next_functions[0][0].metadata[_EXISTED] = mark


def computed_outside(name: str) -> str:
    """The error message for an objective whose graph was made before its closure ran."""
    what = "the loss" if name == LOSS else f"the loss of objective {name!r}"
    return (
        f"{what} was computed outside the closure, so that it would be the same at other weights; "
        "call the model inside the closure"
    )


def freed_outside(name: str) -> str:
    """The error message for a graph from before the closure that a backward pass has freed."""
    what = "the loss" if name == LOSS else f"the loss of objective {name!r}"
    return (
        f"{what} was computed outside the closure, at least in part, in a graph that an earlier "
        "backward pass has freed. Call the model inside the closure, and detach what is carried "
        "over from step to step; for objectives that share one forward pass, pass step() one "
        'closure that returns all losses: {"a": first, "b": second}'
    )


def kept_from_before(name: str) -> str:
    """The error message for a graph that a closure has kept from an earlier call."""
    what = "the loss" if name == LOSS else f"the loss of objective {name!r}"
    return (
        f"{what} was computed in an earlier call of the closure, at least in part, and kept (in a "
        "cache, as a state that is carried over), so that its gradient would not be that of the "
        "present weights; compute it anew in each call, and detach what is carried over"
    )


def as_plain(tensor: Tensor) -> Tensor:
    """The tensor without a data loader's subclass, such as MONAI's MetaTensor.

    Subclasses with a dispatch of their own, such as `DTensor`, are kept.

    Examples:
        >>> class Tagged(torch.Tensor): ...
        >>> type(as_plain(torch.ones(2).as_subclass(Tagged))).__name__
        'Tensor'
    """
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def checked_grad(grad: Tensor, name: str, parameter: Tensor) -> Tensor:
    """The gradient, which must be dense.

    Raises:
        ValueError: If it is sparse.
    """
    if grad.layout != torch.strided:
        raise ValueError(
            f"objective {name!r} has a sparse gradient for a parameter of shape "
            f"{tuple(parameter.shape)}; make the embedding with sparse=False"
        )
    return grad
