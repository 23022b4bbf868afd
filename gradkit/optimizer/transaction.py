"""One attempt at a step: what it evaluates, what it applies, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import scaled
from gradkit.core.context import Context
from gradkit.core.gradients import Gradients
from gradkit.core.gram import norm
from gradkit.core.oracle import Oracle
from gradkit.core.random import RandomState
from gradkit.core.ranks import Processes, as_part_of, local
from gradkit.core.storage import Parts
from gradkit.core.transform import Transform, Weigh, leading_reweighings
from gradkit.engines.evaluator import Evaluator
from gradkit.engines.objectives import LOSS, NoGradientError, Objectives
from gradkit.engines.session import Session
from gradkit.engines.stored import StoredGradients
from gradkit.optimizer.hooks import global_hooks_muted
from gradkit.optimizer.state import link_stepped


class Attempt:
    """One attempt at a step.

    Until `apply` has called the base optimizer, `undo` leaves no trace of it.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        session: Session,
        context: Context,
        *,
        generators: Sequence[torch.Generator | None],
        others: Sequence[Tensor],
        frozen: Sequence[Tensor],
        make_evaluator: Callable[..., Evaluator],
        processes: Processes,
        buffers: Iterable[Tensor],
    ) -> None:
        self.context = context
        self.applied = False
        self.source: Evaluator | StoredGradients | None = None
        self._base = base
        self._session = session
        self._parameters = context.layout.parameters
        self._others = others
        self._make_evaluator = make_evaluator
        self.processes = processes
        self._buffers = buffers
        placed = set(self._parameters)
        # Frozen since a step left them a gradient, which the base would go on stepping on.
        self._stale = [
            (parameter, parameter.grad)
            for group in base.param_groups
            for parameter in group["params"]
            if parameter not in placed and _is_ours(parameter.grad)
        ]
        self._unplaced = [
            parameter
            for group in base.param_groups
            for parameter in group["params"]
            if parameter not in placed
        ]
        # A closure may clear, write or add to the gradients of parameters that are not optimised.
        beside = dict.fromkeys((*others, *(p for p in frozen if p not in placed)))
        self._beside = [_GradientBefore(parameter) for parameter in beside]
        self._grads = [parameter.grad for parameter in self._parameters]
        # Where gradients lie that neither a step has left nor this one will clear.
        self._accumulated = [
            t
            for t, grad in enumerate(self._grads)
            if grad is not None and grad.numel() and not _is_ours(grad)
        ]
        self._random = RandomState.capture(context.layout.device)
        self._generators = [
            (generator, generator.get_state()) for generator in generators if generator is not None
        ]

    def can_only_initialise(self) -> bool:
        """Whether a step without a closure can change nothing.

        That is so if no parameter has a gradient, or if gradients and learning rates are all 0:
        distributed checkpoints step like that to make the base optimizer's state before loading.
        """
        grads = [grad for grad in self._grads if grad is not None]
        still = all(group.get("lr", 1) == 0 for group in self._base.param_groups)
        initialises = not grads or (still and self._all_zero(grads))
        what = "nothing to step on" if initialises else "gradients to step on"
        self.processes.agree("step", self.context.layout.device, names=(what,))
        return initialises

    @property
    def has_no_gradient(self) -> bool:
        """Whether no parameter has a gradient while a learning rate is not 0."""
        moving = any(group.get("lr", 1) != 0 for group in self._base.param_groups)
        return moving and all(grad is None for grad in self._grads)

    def initialise(self, transforms: Sequence[Transform]) -> None:
        """Let the base optimizer make its state, where nothing can change."""
        for parameter, _ in self._stale:
            parameter.grad = None
        with global_hooks_muted():
            self._base.step()
        link_stepped(transforms, self.context.layout, self._base)
        self.applied = True

    def _all_zero(self, grads: Sequence[Tensor]) -> bool:
        shards = self.context.layout.shards
        found = any(bool(local(grad).any()) for grad in grads)
        if shards is not None:  # another rank's shard may hold the only one that is not
            count = torch.tensor(float(found), device=self.context.layout.device)
            found = bool(shards.add_up(count))
        return not found

    def set_gradients_aside(self) -> None:
        """Let closures find no old gradients.

        Those of parameters that are not optimised stay, and are the closures' to clear or add to.
        """
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def average_others(self) -> None:
        """Average the gradients that closures have left beside the optimised ones."""
        processes, others = self.processes, self._beside[: len(self._others)]
        if not (processes.averages and others):
            return
        anywhere = processes.any([[o.has_changed for o in others]], self.context.layout.device)[0]
        for other, found in zip(others, anywhere, strict=True):
            if not found:
                continue
            grad = other.parameter.grad
            grad = torch.zeros_like(other.parameter) if grad is None else grad.detach().clone()
            other.parameter.grad = processes.add_up(grad).div_(processes.size)

    def evaluator(self, objectives: Objectives, weighers: Sequence[Weigh] = ()) -> Evaluator:
        """The innermost oracle over these objectives.

        Args:
            objectives: The objectives.
            weighers: What gives their gradients other weights, first of all.
        """
        return self._make_evaluator(
            objectives,
            self._session,
            self.context,
            weighers=weighers,
            accumulated=self._accumulated,
            beside=self._unplaced,
        )

    def evaluate(self, objectives: Objectives | None, transforms: Sequence[Transform]) -> Gradients:
        """The gradients that the chain of transforms returns; `source` says where they are from."""
        if objectives is None:
            return self._evaluate_stored(LOSS, None, transforms)
        leading = leading_reweighings(transforms)
        weighers = [transform.weigher(self.context) for transform in leading]
        source = self.source = self.evaluator(objectives, weighers)
        try:
            oracle = self._chain(source.evaluate, transforms[len(leading) :])
            return self._checked(oracle(), transforms)
        except NoGradientError as error:
            # A trainer may have called backward before and pass a closure that only reports. What
            # an earlier step left in `.grad` is no such gradient.
            names = self.context.names
            stored = any(grad is not None and not _is_ours(grad) for grad in self._grads)
            if not self.may_be_idle() or names is None or not stored:
                raise
            return self._evaluate_stored(names[0], error.loss, transforms)

    def may_be_idle(self) -> bool:
        """Whether closures have left nothing to step on, in a step that has one objective."""
        source, names = self.source, self.context.names
        if not isinstance(source, Evaluator) or (names is not None and len(names) > 1):
            return False
        return not source.measured and not source.found_gradient

    def _evaluate_stored(
        self, name: str, loss: Tensor | None, transforms: Sequence[Transform]
    ) -> Gradients:
        source = self.source = StoredGradients(
            name, self._grads, loss, self.context, self.processes
        )
        return self._chain(source.evaluate, transforms)()

    @staticmethod
    def _checked(gradients: Gradients, transforms: Sequence[Transform]) -> Gradients:
        if not isinstance(gradients, Gradients):
            raise TypeError(
                f"the oracle of {type(transforms[-1]).__name__} returned a "
                f"{type(gradients).__name__}; return the Gradients"
            )
        return gradients

    def _chain(self, oracle: Oracle, transforms: Sequence[Transform]) -> Oracle:
        for transform in transforms:
            oracle = transform.around(oracle, self.context)
            if not callable(oracle):
                raise TypeError(
                    f"{type(transform).__name__}.around returned a {type(oracle).__name__}; "
                    "return the oracle"
                )
        return oracle

    def direction(self, gradients: Gradients, max_norm: float | None) -> Parts:
        """The direction of the step, clipped, one tensor per parameter."""
        if max_norm is None and gradients.parts is not None:
            return gradients.parts
        return self.context.layout.views(self._flat_direction(gradients, max_norm))

    def _flat_direction(self, gradients: Gradients, max_norm: float | None) -> Float[Tensor, " P"]:
        direction = gradients.direction(out=self.context.pool.take_vector)
        if max_norm is None:
            return direction
        length = norm(direction, over=self.context.layout.shards)
        factor = (max_norm / (length + 1e-6)).clamp(max=1)
        return scaled(direction, factor, self.context.pool.take_vector())

    def apply(
        self,
        gradients: Gradients,
        direction: Parts,
        scale: Tensor | float | None,
        weights: Sequence[float] | None,
        transforms: Sequence[Transform],
    ) -> None:
        """Let the base optimizer step along `direction`, then commit everything else."""
        reached = gradients.reached_by_direction(weights) or (True,) * len(self._parameters)
        ascended = set(self.context.ascended)
        # Whoever keeps or pickles a small part of a flat vector shall not keep the whole.
        large = range(len(direction)) if direction is gradients.parts else self.context.layout.large
        kept = set(large)
        for t, (parameter, part, flag) in enumerate(
            zip(self._parameters, direction, reached, strict=True)
        ):
            if part is None or not flag:
                parameter.grad = None
                continue
            if part.dtype != parameter.dtype:
                part = part.to(parameter.dtype)
            if t in ascended:  # back to the gradient of what is maximised
                part = part.neg()
            elif t not in kept:
                part = part.clone()
            parameter.grad = _marked(as_part_of(part, parameter))
        for parameter, _ in self._stale:
            parameter.grad = None
        self._set_thawed(gradients)
        with scaled_learning_rates(self._base, scale), global_hooks_muted():
            self._base.step()
        for parameter in self._parameters:
            if parameter.grad is not None:
                _marked(parameter.grad)  # some optimizers write into it
        self.applied = True
        self.processes.agree("applied", self.context.layout.device)
        self._session.commit()
        self.processes.share_buffers(self._buffers)
        self.context.gradients = gradients
        for transform in transforms:
            self.context.commit(transform)
        link_stepped(transforms, self.context.layout, self._base)
        with ExitStack() as stack:
            # Called in order; one that raises keeps none of the others from its part.
            for transform in reversed(transforms):
                stack.callback(transform.after_step, self.context)

    def _set_thawed(self, gradients: Gradients) -> None:
        """Give parameters that a closure has unfrozen the weighted sum of their gradients.

        They are stepped on at once, as by the base alone; transforms see them from the next step
        on, when they have a place in the flat vector.
        """
        thawed = self.source.thawed if isinstance(self.source, Evaluator) else {}
        total: dict[Tensor, Tensor] = {}
        for name, grads in thawed.items():
            known = name in gradients.names and not gradients.has_update
            weight = gradients.weights[gradients.index(name)] if known else 1.0
            for parameter, grad in grads.items():
                part = (grad * weight).to(parameter.dtype)
                total[parameter] = total[parameter] + part if parameter in total else part
        for parameter, grad in total.items():
            parameter.grad = _marked(grad)

    def idle(self) -> None:
        """Let the base optimizer step where closures have left no gradient: on nothing.

        What closures have done to buffers stays; old gradients come back.
        """
        self.processes.agree("idle", self.context.layout.device)
        self._step_base_on_nothing()
        self._session.commit()
        self.processes.share_buffers(self._buffers)
        self.put_gradients_back()

    def _step_base_on_nothing(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        for parameter, _ in self._stale:
            parameter.grad = None
        with global_hooks_muted():
            self._base.step()

    def undo(self, *, rng: bool) -> None:
        """Put everything back as it was before the attempt; the random numbers only if `rng`."""
        self._session.rollback()
        self.put_gradients_back()
        for beside in self._beside:
            beside.put_back()
        for beside in self._beside:  # a step's gradients share memory, and its count of writes
            beside.mark()
        for generator, state in self._generators:
            generator.set_state(state)
        if rng:
            self._random.restore()

    def put_gradients_back(self) -> None:
        """Put back what the optimised parameters' `.grad` held before the attempt."""
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        for parameter, grad in self._stale:
            parameter.grad = grad


class _GradientBefore:
    """The gradient of a parameter that is not optimised, as it was before the attempt."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._grad = parameter.grad
        self._value = None if self._grad is None else self._grad.detach().clone()
        self._version = _version(self._grad)
        self._is_ours = _is_ours(self._grad)

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
            _marked(self._grad)


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor has been written to; None for one that does not count."""
    return None if tensor is None or tensor.is_inference() else local(tensor)._version


_MARK = "_gradkit_version"


def _marked(grad: Tensor) -> Tensor:
    """The gradient, recognisable as one that a step has left, until something adds to it."""
    setattr(grad, _MARK, grad._version)
    return grad


def _is_ours(grad: Tensor | None) -> bool:
    mark = getattr(grad, _MARK, None)
    return grad is not None and mark is not None and mark == grad._version


@contextmanager
def scaled_learning_rates(
    base: torch.optim.Optimizer, scale: Tensor | float | None
) -> Iterator[None]:
    """Multiply every group's learning rate by `scale` for the length of the block.

    A learning rate that is a tensor is written to in place, since optimizers and graphs hold on
    to the object.
    """
    if scale is None:
        yield
        return
    for index, group in enumerate(base.param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"group {index} of the base optimizer has no learning rate 'lr' that a transform "
                "could scale; use a base optimizer with one"
            )
    old = [group["lr"] for group in base.param_groups]
    tensors = {id(rate): (rate, rate.clone()) for rate in old if isinstance(rate, Tensor)}
    try:
        with torch.no_grad():
            for rate, _ in tensors.values():  # several groups may share one tensor
                rate.mul_(scale)
        for group, rate in zip(base.param_groups, old, strict=True):
            if not isinstance(rate, Tensor):
                group["lr"] = rate * float(scale)
        yield
    finally:
        with torch.no_grad():
            for rate, value in tensors.values():
                rate.copy_(value)
        for group, rate in zip(base.param_groups, old, strict=True):
            group["lr"] = rate
