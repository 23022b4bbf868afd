"""The mean of objectives as a function of a model's parameters, with gradient and Hessian."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.flat import Layout, copy_parts
from gradkit.core.gram import norm
from gradkit.core.random import RandomState

Objective = Callable[[], Tensor]
Mode = Literal["forward", "reverse"]


class _Host(nn.Module):
    """Runs a function while the parameters and buffers of a model are exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class MeanLoss:
    """The mean of objectives as a function of some of a model's parameters.

    Args:
        objectives: The objectives.
        model: The model that they use.
        chosen: The parameters, by name.

    Attributes:
        layout: Where each parameter lies in the flat vector.
        start: The parameters' values.
        mode: How products with the Hessian are computed.
    """

    def __init__(
        self, objectives: Sequence[Objective], model: nn.Module, chosen: Mapping[str, nn.Parameter]
    ) -> None:
        self._objectives = objectives
        self._model = model
        self._host = _Host(model)
        self._live = list(chosen.values())
        self._names = [f"model.{name}" for name in chosen]
        self.layout = Layout.of([{"params": self._live}])
        if self.layout.shards is not None:
            raise ValueError("the model's parameters are sharded; measure it in one process")
        self.start = [parameter.detach() for parameter in self._live]
        self._random = RandomState.capture(self.layout.device)
        own = set(map(id, self._live))
        self._others = {
            name: parameter.detach()
            for name, parameter in self._host.named_parameters()
            if id(parameter) not in own
        }
        self.mode: Mode = "forward"
        self._is_mode_known = False

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Leave random numbers, modes and gradients as they were."""
        parameters = [(each, each.grad) for each in self._model.parameters()]
        modes = [(module, module.training) for module in self._model.modules()]
        for parameter, _ in parameters:
            parameter.grad = None
        try:
            with torch.enable_grad():
                yield
        finally:
            self._random.restore()
            for module, training in modes:
                module.training = training
            for parameter, grad in parameters:
                parameter.grad = grad

    def displaced(self, by: Float[Tensor, " P"]) -> list[Tensor]:
        """The parameters at θ + ε."""
        pairs = zip(self.start, self.layout.views(by), strict=True)
        return [value + part.to(value.dtype) for value, part in pairs]

    def value(self, at: Sequence[Tensor]) -> float:
        """L at these parameters."""
        self._random.restore()
        losses = [
            float(self._with(at, functools.partial(_loss_of, each))) for each in self._objectives
        ]
        return math.fsum(losses) / len(losses)

    def gradient(self, at: Sequence[Tensor]) -> tuple[float, Float[Tensor, " P"]]:
        """L and its gradient at these parameters.

        Raises:
            RuntimeError: If no objective depends on them by way of the model.
        """
        leaves = [value.clone().requires_grad_() for value in at]

        def both(objective: Objective) -> tuple[Tensor, Sequence[Tensor | None]]:
            loss = _loss_of(objective)
            if any(leaf.grad is not None for leaf in leaves):
                raise RuntimeError("an objective has called backward; return the loss alone")
            if not loss.requires_grad:
                return loss, [None] * len(leaves)
            # The live parameters, too: a graph that reaches one of them bypasses the leaves.
            grads = torch.autograd.grad(loss, [*leaves, *self._live], allow_unused=True)
            for name, grad in zip(self._names, grads[len(leaves) :], strict=True):
                if grad is not None:
                    raise RuntimeError(
                        "an objective was computed beforehand, or uses the parameter "
                        f"{name.removeprefix('model.')!r} by a reference made outside; run the "
                        "model inside the objective, and look parameters up in it there"
                    )
            return loss.detach(), grads[: len(leaves)]

        self._random.restore()
        losses: list[float] = []
        total = self.layout.zeros()
        reached = False
        for objective in self._objectives:
            loss, grads = self._with(leaves, functools.partial(both, objective))
            losses.append(float(loss))
            reached = reached or any(grad is not None for grad in grads)
            total += self._flat(grads)
        if not reached:
            raise RuntimeError(
                "the loss does not depend on the parameters that are measured; run the model "
                "inside the objective, without no_grad() or detach()"
            )
        return math.fsum(losses) / len(losses), total / len(losses)

    def product(self, vector: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The Hessian at θ times a vector.

        Raises:
            RuntimeError: If an objective cannot be differentiated twice.
            ValueError: If the product is not finite.
        """
        pairs = zip(self.start, self.layout.views(vector), strict=True)
        parts = [part.to(value.dtype) for value, part in pairs]
        if self._is_mode_known:
            total = self._summed(parts)
        else:
            total = self._first(parts)
            self._is_mode_known = True
        if not math.isfinite(float(norm(total))):
            raise ValueError("a product with the Hessian is not finite; the loss has no curvature")
        return total / len(self._objectives)

    def _first(self, parts: Sequence[Tensor]) -> Float[Tensor, " P"]:
        """The sum for the first vector, by forward mode if the operations have formulas for it."""
        try:
            return self._summed(parts)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # so torch says that there is none, in several wordings
            self.mode = "reverse"
        try:
            return self._summed(parts)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"an objective cannot be differentiated twice: {error}; where that is the fused "
                "attention, run it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            ) from error

    def _summed(self, parts: Sequence[Tensor]) -> Float[Tensor, " P"]:
        times = self._forward_times if self.mode == "forward" else self._reverse_times
        self._random.restore()
        total = self.layout.zeros()
        for objective in self._objectives:
            total += self._flat(times(objective, parts))
        return total

    def _forward_times(self, objective: Objective, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        def loss(*at: Tensor) -> Tensor:
            found: Tensor = self._with(at, functools.partial(_loss_of, objective))
            return found

        gradient = torch.func.grad(loss, argnums=tuple(range(len(parts))))
        with warnings.catch_warnings():  # torch scripts formulas when it first needs them
            warnings.filterwarnings("ignore", r".torch\.jit\.script", DeprecationWarning)
            product: Sequence[Tensor] = torch.func.jvp(gradient, tuple(self.start), tuple(parts))[1]
        return product

    def _reverse_times(
        self, objective: Objective, parts: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        leaves = [value.clone().requires_grad_() for value in self.start]

        def times() -> Sequence[Tensor | None]:
            loss = _loss_of(objective)
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            bent: list[Tensor] = []
            along: list[Tensor] = []
            for grad, part in zip(grads, parts, strict=True):
                if grad is not None and grad.requires_grad:  # others are constant
                    bent.append(grad)
                    along.append(part)
            if not bent:
                return [None] * len(leaves)
            return torch.autograd.grad(bent, leaves, along, allow_unused=True)

        products: Sequence[Tensor | None] = self._with(leaves, times)
        return products

    def _with(self, at: Sequence[Tensor], function: Callable[[], Any]) -> Any:
        """A function's result while the model holds these parameters and clones of its buffers."""
        buffers = {name: each.detach().clone() for name, each in self._host.named_buffers()}
        values = {**self._others, **dict(zip(self._names, at, strict=True)), **buffers}
        return torch.func.functional_call(self._host, values, (function,))

    def _flat(self, parts: Sequence[Tensor | None]) -> Float[Tensor, " P"]:
        vector = self.layout.zeros()
        copy_parts(
            [None if part is None else part.detach() for part in parts], self.layout.views(vector)
        )
        return vector


def _loss_of(objective: Objective) -> Tensor:
    """The loss of an objective as a 0-d tensor.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is not a real scalar.
    """
    loss = objective()
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"an objective returned a {type(loss).__name__}; return one loss as a tensor, and pass "
            "a list of objectives for several batches"
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"an objective returned a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}; "
            "return one floating-point number: take its mean() or sum()"
        )
    return loss.reshape(())
