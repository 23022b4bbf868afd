"""The forms in which a step's objectives may be given."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]
Objectives = Closure | Mapping[str, Closure]

LOSS = "loss"
"""The name of a single, unnamed objective."""


class NoGradientError(RuntimeError):
    """A closure produced no gradient; `loss` is what it returned."""

    def __init__(self, message: str, loss: Tensor | None = None) -> None:
        super().__init__(message)
        self.loss = loss


def check_objectives(objectives: object) -> None:
    """Check what was passed to `step`.

    Raises:
        TypeError: If it is neither a callable nor a mapping from names to callables.
        ValueError: If it is an empty mapping.
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
    elif not callable(objectives):
        raise TypeError(
            f"step() takes a closure or a mapping of closures, not a "
            f"{type(objectives).__name__}; write step(lambda: loss)"
        )


@contextmanager
def micro_batches(returned: object) -> Iterator[Iterator[Any]]:
    """What a closure has returned, or, if that is a generator, yields: an item per micro-batch."""
    if isinstance(returned, Generator):
        try:
            yield returned
        finally:
            returned.close()
    else:
        yield iter((returned,))


def checked_loss(loss: object, name: str) -> Tensor | None:
    """The loss as a 0-d tensor; None stays None.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is no real scalar.
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
    return loss.reshape(())


def refuse_reentrant_checkpoints(loss: Tensor, name: str, seen: set[object]) -> None:
    """Check that no reentrant checkpoint hides parameters from autograd.

    It calls backward inside its own backward, and is passed over where only gradients with
    respect to given tensors are asked for: the parameters in it would silently not be trained.

    Args:
        loss: Where the graph ends.
        name: The objective's name.
        seen: The nodes that have been looked at already, of other losses; it is added to.

    Raises:
        RuntimeError: If there is one.
    """
    ahead = [] if loss.grad_fn in seen else [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        if "CheckpointFunction" in type(node).__name__:
            raise RuntimeError(
                f"objective {name!r} uses torch.utils.checkpoint with use_reentrant=True, which "
                "hides parameters from the gradient; pass use_reentrant=False"
            )
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                ahead.append(following)


def checked_grad(grad: Tensor | None, name: str, parameter: Tensor) -> Tensor | None:
    """The gradient, if inner products can be taken of it.

    Raises:
        ValueError: If it is sparse.
    """
    if grad is not None and grad.layout != torch.strided:
        raise ValueError(
            f"objective {name!r} has a sparse gradient for a parameter of shape "
            f"{tuple(parameter.shape)}; make the embedding with sparse=False"
        )
    return grad
