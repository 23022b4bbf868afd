"""The gradients and losses of one evaluation, accumulated over micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.context import Context
from gradkit.core.flat import are_unshared, copy_parts
from gradkit.core.gradients import Gradients
from gradkit.core.gram import accumulator
from gradkit.core.ranks import Ranks, local
from gradkit.core.storage import Parts, Single
from gradkit.engines.backward import Receivers
from gradkit.engines.objectives import LOSS, NoGradientError, as_plain, checked_grad


class Rows:
    """The rows and losses of one evaluation, accumulated over micro-batches.

    A single gradient stays in the tensors that autograd has returned. It is copied to a flat row
    only if something is added to it, or if a row is needed.

    Args:
        names: The objectives that have a row.
        leaves: The tensors to differentiate with respect to.
        context: The step's context.
        losses: The objectives whose losses are accumulated; by default those of the rows.

    Attributes:
        unfrozen: By objective, the gradients of parameters that have no place in the flat vector.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        leaves: Sequence[Tensor],
        context: Context,
        losses: tuple[str, ...] | None = None,
    ) -> None:
        self._names = names
        self._layout = context.layout
        self._pool = context.pool
        self._buffer: tuple[Tensor, list[list[Tensor]]] | None = None
        self._parts: Parts | None = None
        self._reached = {name: [False] * len(leaves) for name in names}
        self._losses: dict[str, Tensor | None] = dict.fromkeys(names if losses is None else losses)
        self.unfrozen: dict[str, dict[Tensor, Tensor]] = {}

    def add_loss(self, name: str, loss: Tensor | None) -> None:
        """Add a micro-batch's loss; None if the closure returned none."""
        if loss is not None:
            before = self._losses.get(name)
            loss = loss.detach()
            if loss.dtype != torch.float32 or loss.device != self._layout.device:
                dtype = torch.promote_types(loss.dtype, torch.float32)
                loss = loss.to(self._layout.device, dtype)
            self._losses[name] = loss if before is None else before + loss

    def loss(self, name: str) -> Tensor:
        """The summed loss; NaN if the closure returned None."""
        loss = self._losses.get(name)
        if loss is None:
            dtype = torch.promote_types(self._layout.dtype, torch.float32)
            return torch.full((), torch.nan, dtype=dtype, device=self._layout.device)
        return loss

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._layout.device

    @property
    def losses(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Each objective, its summed loss, and whether it has a row."""
        return ((name, self.loss(name), name in self._reached) for name in self._losses)

    def without_loss(self) -> set[str]:
        """The objectives whose closure called backward and returned None."""
        return {name for name, loss in self._losses.items() if loss is None}

    def receivers(self, name: str) -> Receivers:
        """Functions that copy large gradients to an objective's row as autograd computes them.

        A gradient that is still in the cache is cheap to copy, and its memory is reused for the
        next one at once. There are no receivers where this gains nothing: for a single gradient,
        which stays in its own tensors, and on accelerators, whose allocators keep memory and which
        would launch one more kernel for each parameter.
        """
        layout = self._layout
        reached = self._reached[name]
        alone = len(self._names) == 1 and not any(reached)
        if alone or not layout.large or layout.device.type != "cpu":
            return {}
        views = self._flat()[1][self._names.index(name)]

        def take(t: int, grad: Tensor) -> None:
            if reached[t]:
                views[t].add_(grad)
            else:
                views[t].copy_(grad)
                reached[t] = True

        return {t: functools.partial(take, t) for t in layout.large}

    def add(self, name: str, grads: Sequence[Tensor | None]) -> None:
        """Add a micro-batch's gradients.

        Args:
            name: The objective.
            grads: One gradient per parameter; None if the graph did not reach the parameter, or if
                the gradient has already been received.

        Raises:
            NoGradientError: If the objective's graph has reached no parameter.
            ValueError: If a gradient is sparse.
        """
        if name not in self._reached:
            return
        reached = self._reached[name]
        first = not any(reached)
        there = [t for t, grad in enumerate(grads) if grad is not None]
        if any(map(_is_special, grads)):
            grads = [
                None if grad is None else _as_local(checked_grad(grad, name, parameter))
                for grad, parameter in zip(grads, self._layout.parameters, strict=True)
            ]
        if not there and first and not self.unfrozen.get(name):
            raise NoGradientError(no_gradient(name))
        if first and len(self._names) == 1 and self._are_their_own(grads):
            self._parts = grads
            self._reached[name] = [grad is not None for grad in grads]
            return
        views = self._flat()[1][self._names.index(name)]
        new = there if first else [t for t in there if not reached[t]]
        if len(new) == len(views):
            torch._foreach_copy_(views, [grad for grad in grads if grad is not None])
        elif new:
            torch._foreach_copy_(_chosen(views, new), _chosen(grads, new))
        if len(new) < len(there):
            more = [t for t in there if reached[t]]
            torch._foreach_add_(_chosen(views, more), _chosen(grads, more))
        for t in new:
            reached[t] = True

    @torch.no_grad()
    def add_unfrozen(self, name: str, grads: Mapping[Tensor, Tensor | None]) -> None:
        """Add a micro-batch's gradients of parameters that have no place in the flat vector."""
        held = self.unfrozen.setdefault(name, {}) if grads else {}
        for parameter, grad in grads.items():
            if grad is not None:
                grad = as_plain(checked_grad(grad, name, parameter))
                held[parameter] = held[parameter] + grad if parameter in held else grad

    def negate_losses(self) -> None:
        """Negate the losses, where they are maximised."""
        for name, loss in self._losses.items():
            self._losses[name] = None if loss is None else -loss

    def _are_their_own(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these tensors have the parameters' memory format and share no memory."""
        layout = self._layout
        for index, (dtype, strides) in enumerate(zip(layout.dtypes, layout.strides, strict=True)):
            grad = grads[index]
            if grad is None:
                continue
            fits = grad.is_contiguous() if strides is None else grad.stride() == strides
            if grad.requires_grad or not (fits and grad.dtype == layout.dtype == dtype):
                return False
        grad = None  # only the list may hold a reference
        return are_unshared(grads)

    def _flat(self) -> tuple[Float[Tensor, "K P"], list[list[Tensor]]]:
        """The flat rows and their views; parts that were added before are copied to them."""
        if self._buffer is None:
            self._buffer = self._pool.take(len(self._names))
            if self._parts is not None:
                copy_parts(self._parts, self._buffer[1][0])
                self._parts = None
        return self._buffer

    def finish(
        self,
        ranks: Ranks,
        settings: int,
        unscale: Float[Tensor, ""] | None,
        ascended: Sequence[int],
        *,
        averages: bool,
    ) -> None:
        """Undo the loss scale, average over the ranks, and negate gradients that are maximised.

        Args:
            ranks: The ranks that step together.
            settings: A number that must be the same on all ranks.
            unscale: The factor of the gradients; None for 1.
            ascended: The parameters whose gradients are negated.
            averages: Whether gradients are averaged over the ranks; losses always are.

        Raises:
            RankError: If a rank has failed, or if the ranks differ where they must not.
        """
        if self._parts is None or unscale is not None or averages:
            for name, views in zip(self._names, self._flat()[1], strict=True):
                unreached = [t for t, flag in enumerate(self._reached[name]) if not flag]
                if unreached:
                    torch._foreach_zero_(_chosen(views, unreached))
        factor: Tensor | float | None = unscale
        if ranks.together:
            self._average(ranks, settings, averages)
            if averages:
                share = 1 / ranks.size
                factor = share if unscale is None else unscale * share
        if factor is not None:
            self._flat()[0].mul_(factor)
        if unscale is not None:
            for held in self.unfrozen.values():
                held.update({parameter: grad * unscale for parameter, grad in held.items()})
        if ascended:
            vectors = [self._parts] if self._parts is not None else self._flat()[1]
            torch._foreach_neg_([part for parts in vectors for part in _chosen(parts, ascended)])

    def _average(self, ranks: Ranks, settings: int, averages: bool) -> None:
        device = self._layout.device
        flags = bytes(flag for name in self._names for flag in self._reached[name])
        alike = ranks.agree("evaluation", device, names=self._names, settings=settings, flags=flags)
        if not alike:
            everywhere = ranks.any([self._reached[name] for name in self._names], device)
            self._reached = dict(zip(self._names, everywhere, strict=True))
        names = [*self._losses]
        losses = stacked([self.loss(name) for name in names], device).to(accumulator(device))
        ranks.add_up(losses).div_(ranks.size)
        for name, loss in zip(names, losses, strict=True):
            own = self._losses[name]
            if own is not None:
                self._losses[name] = loss.to(own.dtype)
        if averages:
            ranks.add_up(self._flat()[0])

    def gradients(self) -> Gradients:
        """The accumulated gradients."""
        if self._parts is not None:
            (name,) = self._names
            return Gradients(
                (name,),
                self.loss(name)[None],
                Single(self._parts, self._layout, self._flattened),
                reached=(tuple(part is not None for part in self._parts),),
            )
        return Gradients(
            self._names,
            stacked([self.loss(name) for name in self._names], self._layout.device),
            self._flat()[0],
            layout=self._layout,
            reached=tuple(tuple(self._reached[name]) for name in self._names),
        )

    def _flattened(self, parts: Parts) -> Float[Tensor, "1 P"]:
        rows, views = self._pool.take(1)
        with torch.no_grad():
            copy_parts(parts, views[0])
        return rows


def stacked(losses: Sequence[Tensor], device: torch.device) -> Float[Tensor, " K"]:
    """Losses as one vector, in the widest dtype among them."""
    if not losses:
        return torch.zeros(0, dtype=torch.float32, device=device)
    dtype = torch.float32
    for other in {loss.dtype for loss in losses} - {dtype}:
        dtype = torch.promote_types(dtype, other)
    return torch.stack([loss if loss.dtype == dtype else loss.to(dtype) for loss in losses])


def _is_special(grad: Tensor | None) -> bool:
    return grad is not None and (
        type(grad) is not Tensor or grad.requires_grad or grad.layout != torch.strided
    )


def _as_local(grad: Tensor) -> Tensor:
    # A closure's own backward may have recorded the gradient's graph.
    return local(as_plain(grad)).detach()


def _chosen(parts: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
    return [part for part in map(parts.__getitem__, indices) if part is not None]


def no_gradient(name: str, *, none: bool = False) -> str:
    """The error message for an objective without a gradient.

    Args:
        name: The objective.
        none: Whether its loss is None.
    """
    what = "the closure" if name == LOSS else f"the closure of objective {name!r}"
    leave_out = "" if name == LOSS else "; leave out an objective that has no loss in this step"
    if none:
        return (
            f"{what} produced no gradient: the loss is None, and no optimised parameter has a "
            f"gradient (is there a return?){leave_out}"
        )
    return (
        f"{what} produced no gradient: its loss does not depend on any optimised parameter "
        f"(was it computed under no_grad, detached, from frozen parameters only, or kept "
        f"from an earlier call?){leave_out}"
    )
