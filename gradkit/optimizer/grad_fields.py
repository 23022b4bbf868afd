"""The `.grad` of parameters: its value before a step, and the gradients that a step leaves."""

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
        accumulated: The positions of optimised parameters whose gradients were not left by a step.
            This step clears them.
        before: The gradients of optimised parameters before the step.

    Args:
        base: The wrapped optimizer.
        layout: Where each optimised parameter lies in the flat vector.
        others: Parameters of the model that require a gradient and are not optimised.
        frozen: Parameters of the optimizer or the model that do not require a gradient.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        layout: Layout,
        others: Sequence[Tensor],
        frozen: Sequence[Tensor],
    ) -> None:
        self._parameters = layout.parameters
        self._device = layout.device
        self._shards = layout.shards
        every = [parameter for group in base.param_groups for parameter in group["params"]]
        placed = set(self._parameters)
        self.unplaced = [] if len(every) == len(placed) else [p for p in every if p not in placed]
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
            if grad is not None and not is_ours(grad) and grad.numel()
        ]

    @property
    def are_none(self) -> bool:
        """Whether no optimised parameter had a gradient before the step."""
        return all(grad is None for grad in self.before)

    @property
    def are_zero(self) -> bool:
        """Whether all gradients of optimised parameters were 0 or None; read from the device."""
        found = any(grad is not None and bool(local(grad).any()) for grad in self.before)
        if self._shards is not None:  # the only nonzero element may be in another rank's shard
            found = bool(self._shards.add_up(torch.tensor(float(found), device=self._device)))
        return not found

    @property
    def hold_others(self) -> bool:
        """Whether an optimised parameter had a gradient that was not left by a step."""
        return any(grad is not None and not is_ours(grad) for grad in self.before)

    def set_aside(self) -> None:
        """Clear the gradients of optimised parameters, so that closures find no old ones.

        Gradients of other parameters stay; closures may clear them or accumulate into them.
        """
        for parameter in self._parameters:
            parameter.grad = None

    def drop_stale(self) -> None:
        """Clear gradients of parameters that were frozen after a step, but still hold its gradient.

        The base optimizer would otherwise step on them.
        """
        for parameter, _ in self._stale:
            parameter.grad = None

    def average_others(self, ranks: Ranks) -> None:
        """Average over ranks the gradients that closures have left in parameters not optimised."""
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
        """Restore the gradients of the optimizer's parameters."""
        for parameter, grad in (*zip(self._parameters, self.before, strict=True), *self._stale):
            parameter.grad = grad

    def put_all_back(self) -> None:
        """Restore the gradients of all parameters, whatever closures have done."""
        self.put_back()
        for beside in self._beside:
            beside.put_back()
        # Only afterwards: a step's gradients may share memory, and with it their version counter.
        for beside in self._beside:
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
        """Whether a closure has replaced the gradient or written to it."""
        grad = self.parameter.grad
        return grad is not self._grad or _version(grad) != self._version

    def put_back(self) -> None:
        """Restore the gradient: the tensor object and its values."""
        self.parameter.grad = grad = self._grad
        if grad is None or self._value is None:
            return
        now, before = local(grad), local(self._value)
        # Some ways of writing to a tensor do not change its version.
        if self.has_changed or not torch.equal(now, before):
            with torch.inference_mode(now.is_inference()), torch.no_grad():
                now.copy_(before)

    def mark(self) -> None:
        """Mark the gradient again as left by a step, if it was."""
        if self._grad is not None and self._is_ours:
            marked(self._grad)


def _version(tensor: Tensor | None) -> int | None:
    """A tensor's version counter; None for a tensor without one."""
    return None if tensor is None or tensor.is_inference() else local(tensor)._version


_MARK = "_gradkit_version"


def marked(grad: Tensor) -> Tensor:
    """The gradient, marked as left by a step; the mark is void once something writes to it."""
    setattr(grad, _MARK, grad._version)
    return grad


def is_ours(grad: Tensor | None) -> bool:
    """Whether a step has left this gradient, and nothing has written to it since."""
    mark = getattr(grad, _MARK, None)
    return grad is not None and mark is not None and mark == grad._version
