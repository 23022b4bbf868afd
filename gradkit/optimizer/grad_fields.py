"""What parameters' `.grad` held before a step, and what a step leaves there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkit.core.flat import Layout
from gradkit.core.ranks import Ranks, local


class GradFields:
    """The `.grad` of all parameters from before a step.

    Attributes:
        unplaced: The optimizer's parameters that have no place in the flat vector.
        accumulated: Where optimised parameters hold gradients that neither a step has left nor this
            one will clear.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        layout: Layout,
        others: Sequence[Tensor],
        frozen: Sequence[Tensor],
    ) -> None:
        """Note what there is.

        Args:
            base: The wrapped optimizer.
            layout: Where each optimised parameter lies in the flat vector.
            others: Parameters of the model that require a gradient and are not optimised.
            frozen: Parameters of either that do not require one.
        """
        self._parameters = layout.parameters
        self._device = layout.device
        self._shards = layout.shards
        placed = set(self._parameters)
        every = [parameter for group in base.param_groups for parameter in group["params"]]
        self.unplaced = [parameter for parameter in every if parameter not in placed]
        # Frozen after a step, but still holding its gradient.
        self._stale = [(p, p.grad) for p in self.unplaced if is_ours(p.grad)]
        # A closure may clear, write or add to the gradients of parameters that are not optimised.
        beside = dict.fromkeys((*others, *(p for p in frozen if p not in placed)))
        self._beside = [_GradientBefore(parameter) for parameter in beside]
        self._others = self._beside[: len(others)]
        self.before = [parameter.grad for parameter in self._parameters]
        self.accumulated = [
            t
            for t, grad in enumerate(self.before)
            if grad is not None and grad.numel() and not is_ours(grad)
        ]

    @property
    def are_none(self) -> bool:
        """Whether no optimised parameter had a gradient."""
        return all(grad is None for grad in self.before)

    @property
    def are_zero(self) -> bool:
        """Whether all gradients of optimised parameters were 0; read from the device."""
        found = any(grad is not None and bool(local(grad).any()) for grad in self.before)
        if self._shards is not None:  # another rank's shard may hold the only one that is not
            found = bool(self._shards.add_up(torch.tensor(float(found), device=self._device)))
        return not found

    @property
    def hold_others(self) -> bool:
        """Whether somebody else than a step has left gradients of optimised parameters."""
        return any(grad is not None and not is_ours(grad) for grad in self.before)

    def set_aside(self) -> None:
        """Let closures find no old gradients.

        Those of parameters that are not optimised stay, and are the closures' to clear or add to.
        """
        for parameter in self._parameters:
            parameter.grad = None

    def drop_stale(self) -> None:
        """Clear what a step has left in parameters that were frozen since."""
        for parameter, _ in self._stale:
            parameter.grad = None

    @torch.no_grad()
    def average_others(self, ranks: Ranks) -> None:
        """Average the gradients that closures have left beside the optimised ones."""
        if not (ranks.averages and self._others):
            return
        anywhere = ranks.any([[o.has_changed for o in self._others]], self._device)[0]
        for other, found in zip(self._others, anywhere, strict=True):
            if not found:
                continue
            grad = other.parameter.grad
            grad = torch.zeros_like(other.parameter) if grad is None else grad.detach().clone()
            other.parameter.grad = ranks.add_up(grad).div_(ranks.size)

    def put_back(self) -> None:
        """Put back what the optimizer's parameters held."""
        for parameter, grad in (*zip(self._parameters, self.before, strict=True), *self._stale):
            parameter.grad = grad

    def put_all_back(self) -> None:
        """Put back what all parameters held, whatever closures have done."""
        self.put_back()
        for beside in self._beside:
            beside.put_back()
        for beside in self._beside:  # a step's gradients share memory, and its count of writes
            beside.mark()


class _GradientBefore:
    """The gradient that a parameter which is not optimised had before the step."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._grad = parameter.grad
        self._value = None if self._grad is None else self._grad.detach().clone()
        self._version = _version(self._grad)
        self._is_ours = is_ours(self._grad)

    @property
    def has_changed(self) -> bool:
        """Whether a closure has put another there, or written to it."""
        grad = self.parameter.grad
        return grad is not self._grad or _version(grad) != self._version

    def put_back(self) -> None:
        """Undo whatever a closure has done to it."""
        self.parameter.grad = grad = self._grad
        if grad is None or self._value is None:
            return
        now, before = local(grad), local(self._value)
        # Not every way of writing to it shows in its version.
        if self.has_changed or not torch.equal(now, before):
            with torch.inference_mode(now.is_inference()), torch.no_grad():
                now.copy_(before)

    def mark(self) -> None:
        """Make it recognisable again as one that a step has left, if it was."""
        if self._grad is not None and self._is_ours:
            marked(self._grad)


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor has been written to; None for one that does not count."""
    return None if tensor is None or tensor.is_inference() else local(tensor)._version


_MARK = "_gradkit_version"


def marked(grad: Tensor) -> Tensor:
    """The gradient, recognisable as one that a step has left, until something adds to it."""
    setattr(grad, _MARK, grad._version)
    return grad


def is_ours(grad: Tensor | None) -> bool:
    """Whether a step has left this gradient, and nobody has added to it since."""
    mark = getattr(grad, _MARK, None)
    return grad is not None and mark is not None and mark == grad._version
