"""The transaction of one step: evaluate, then apply everything or undo everything."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.combine import scaled
from gradkit.core.context import Context
from gradkit.core.displacement import Point
from gradkit.core.gradients import Gradients
from gradkit.core.gram import norm
from gradkit.core.oracle import Oracle
from gradkit.core.random import RandomState
from gradkit.core.ranks import Ranks, as_part_of
from gradkit.core.storage import Parts
from gradkit.core.transform import Reweighing, Transform, Weigh, leading_reweighings
from gradkit.engines.evaluator import Evaluator
from gradkit.engines.objectives import LOSS, NoGradientError, Objectives
from gradkit.engines.session import Session
from gradkit.engines.stored import StoredGradients
from gradkit.optimizer.grad_fields import GradFields, marked
from gradkit.optimizer.hooks import global_hooks_muted
from gradkit.optimizer.state import link_stepped


class Transaction:
    """One step, which is applied as a whole or leaves no trace.

    Until `apply` has called the base optimizer, `undo` can restore everything.
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
        ranks: Ranks,
        buffers: Iterable[Tensor],
    ) -> None:
        self.context = context
        self.applied = False
        self.source: Evaluator | StoredGradients | None = None
        self._base = base
        self._session = session
        self._parameters = context.layout.parameters
        self._make_evaluator = make_evaluator
        self.ranks = ranks
        self._buffers = buffers
        self.fields = GradFields(base, context.layout, others, frozen)
        self._random = RandomState.capture(context.layout.device)
        self._generators = [
            (generator, generator.get_state()) for generator in generators if generator is not None
        ]

    def can_only_initialise(self) -> bool:
        """Whether a step without a closure can only initialise the base optimizer's state.

        This is so if no parameter has a gradient, or if all gradients and learning rates are 0.
        Distributed checkpoints step in this way before loading.

        Raises:
            RankError: If the ranks differ in this.
        """
        still = all(group.get("lr", 1) == 0 for group in self._base.param_groups)
        initialises = self.fields.are_none or (still and self.fields.are_zero)
        what = "nothing to step on" if initialises else "gradients to step on"
        self.ranks.agree("step", self.context.layout.device, names=(what,))
        return initialises

    @property
    def has_no_gradient(self) -> bool:
        """Whether no parameter has a gradient although a learning rate is not 0."""
        moving = any(group.get("lr", 1) != 0 for group in self._base.param_groups)
        return moving and self.fields.are_none

    def initialise(self, transforms: Sequence[Transform]) -> None:
        """Let the base optimizer initialise its state in a step that changes no weight."""
        self.fields.drop_stale()
        with global_hooks_muted():
            self._base.step()
        link_stepped(transforms, self.context.layout, self._base)
        self.applied = True

    def evaluator(
        self,
        objectives: Objectives,
        weighers: Sequence[Weigh] = (),
        *,
        never_zero: bool = True,
    ) -> Evaluator:
        """The innermost oracle over these objectives.

        Args:
            objectives: The objectives.
            weighers: The functions that reweight their gradients first.
            never_zero: Whether none of them makes a weight 0.
        """
        return self._make_evaluator(
            objectives,
            self._session,
            self.context,
            weighers=weighers,
            never_zero=never_zero,
            accumulated=self.fields.accumulated,
            beside=self.fields.unplaced,
        )

    def evaluate(self, objectives: Objectives | None, transforms: Sequence[Transform]) -> Gradients:
        """The gradients that the chain of transforms returns; sets `source`.

        Raises:
            NoGradientError: If the objectives leave no gradient.
            TypeError: If a transform returns something else than an oracle or gradients.
            ValueError: If the gradients that it returns do not fit the weights.
        """
        if objectives is None:
            return self._evaluate_stored(LOSS, None, transforms)
        leading = leading_reweighings(transforms)
        weighers = [_checked_weigher(transform, self.context) for transform in leading]
        never_zero = all(transform.never_zero for transform in leading)
        source = self.source = self.evaluator(objectives, weighers, never_zero=never_zero)
        try:
            return self._chain(source.evaluate, transforms[len(leading) :])()
        except NoGradientError as error:
            # A trainer may have called backward before, and its closure may only report the loss.
            # Gradients that an earlier step left in `.grad` do not count.
            names = self.context.names
            if not self.may_be_idle() or names is None or not self.fields.hold_others:
                raise
            return self._evaluate_stored(names[0], error.loss, transforms)

    def may_be_idle(self) -> bool:
        """Whether the only objective of the step has left nothing to step on."""
        source, names = self.source, self.context.names
        if not isinstance(source, Evaluator) or (names is not None and len(names) > 1):
            return False
        return not source.measured and not source.found_gradient

    def _evaluate_stored(
        self, name: str, loss: Tensor | None, transforms: Sequence[Transform]
    ) -> Gradients:
        source = self.source = StoredGradients(
            name, self.fields.before, loss, self.context, self.ranks
        )
        return self._chain(source.evaluate, transforms)()

    def _chain(self, oracle: Oracle, transforms: Sequence[Transform]) -> Oracle:
        for transform in transforms:
            oracle = _checked_oracle(oracle, transform, self.context)
            if transform.per_rank and self.ranks.together:
                oracle = self._per_rank(oracle, transform)
        return oracle

    def _per_rank(self, oracle: Oracle, transform: Transform) -> Oracle:
        """The mean over the ranks of what each one makes of its own gradients.

        Raises:
            ValueError: If gradients are reduced as they are computed, since parameters are sharded.
        """
        if self.context.layout.shards is not None:
            raise ValueError(
                f"{transform!r} works on each rank's own gradient, which is never whole where "
                "parameters are sharded; pass sync_perturbation=True"
            )
        source, context = self.source, self.context

        def mean(value: Tensor) -> Tensor:
            return self.ranks.add_up(value.clone()).div_(self.ranks.size)

        def averaged(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
            if not isinstance(source, Evaluator) or source.is_local:
                return oracle(at, only)
            before = context.proposals()
            with source.locally():
                found = oracle(at, only)
            context.average_proposals(mean, before)
            found = found.averaged(mean)
            source.note(found)
            return found

        return averaged

    def direction(self, gradients: Gradients, max_norm: float | None) -> Parts:
        """The direction of the step, clipped, one tensor per parameter."""
        if max_norm is None:
            gradients.settle()
            parts = gradients.parts
            if parts is not None:
                return parts
        return self.context.layout.views(self._flat_direction(gradients, max_norm))

    def _flat_direction(self, gradients: Gradients, max_norm: float | None) -> Float[Tensor, " P"]:
        direction = gradients.direction(out=self.context.pool.take_vector)
        if max_norm is None:
            return direction
        direction_norm = norm(direction, over=self.context.layout.shards)
        factor = (max_norm / (direction_norm + 1e-6)).clamp(max=1)
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
        layout, ascended = self.context.layout, set(self.context.ascended)
        reached = gradients.reached_by_direction(weights) or (True,) * len(self._parameters)
        # Small parts are cloned, so that a reference or a pickle does not keep the whole vector.
        cloned = set() if direction is gradients.parts else layout.small
        for t, (parameter, part, flag) in enumerate(
            zip(self._parameters, direction, reached, strict=True)
        ):
            if part is None or not flag:
                parameter.grad = None
                continue
            if part.dtype != layout.dtypes[t]:
                part = part.to(layout.dtypes[t])
            if t in ascended:  # back to the gradient of the objective that is maximised
                part = part.neg()
            elif t in cloned:
                part = part.clone()
            if layout.shards is not None:
                part = as_part_of(part, parameter)
            parameter.grad = marked(part)
        self.fields.drop_stale()
        self._set_unfrozen_grads(gradients)
        with scaled_learning_rates(self._base, scale), global_hooks_muted():
            self._base.step()
        for parameter in self._parameters:
            grad = parameter.grad
            if grad is not None:
                marked(grad)  # some optimizers write to it
        self.applied = True
        self.ranks.agree("applied", self.context.layout.device)
        self._session.commit()
        self.ranks.share_buffers(self._buffers)
        self.context.gradients = gradients
        self.context.commit(transforms)
        link_stepped(transforms, self.context.layout, self._base)
        self._after_step(transforms)

    def _after_step(self, transforms: Sequence[Transform]) -> None:
        """Call `after_step` of each transform in order, of all of them even if one raises."""
        if not transforms:
            return
        try:
            transforms[0].after_step(self.context)
        finally:
            self._after_step(transforms[1:])

    def _set_unfrozen_grads(self, gradients: Gradients) -> None:
        """Set the `.grad` of parameters that a closure has unfrozen to their weighted sum.

        The base optimizer steps on them at once, as it would alone. Transforms see them from the
        next step on, when they have a place in the flat vector.
        """
        unfrozen = self.source.unfrozen if isinstance(self.source, Evaluator) else {}
        total: dict[Tensor, Tensor] = {}
        for name, grads in unfrozen.items():
            known = name in gradients.names and not gradients.has_update
            weight = gradients.weights[gradients.index(name)] if known else 1.0
            for parameter, grad in grads.items():
                part = (grad * weight).to(parameter.dtype)
                total[parameter] = total[parameter] + part if parameter in total else part
        for parameter, grad in total.items():
            parameter.grad = marked(grad)

    def idle(self) -> None:
        """Let the base optimizer step without gradients, where closures have left none.

        Changes of buffers are kept; old gradients and the transforms' generators are restored.
        """
        self.ranks.agree("idle", self.context.layout.device)
        self.fields.set_aside()
        self.fields.drop_stale()
        with global_hooks_muted():
            self._base.step()
        self._session.commit()
        self.ranks.share_buffers(self._buffers)
        self.fields.put_back()
        self._put_back_generators()

    def undo(self, *, rng: bool) -> None:
        """Restore the state from before the step; torch's default generators only if `rng`."""
        self._session.rollback()
        self.fields.put_all_back()
        self._put_back_generators()
        if rng:
            self._random.restore()

    def _put_back_generators(self) -> None:
        for generator, state in self._generators:
            generator.set_state(state)


def _checked_oracle(inner: Oracle, transform: Transform, context: Context) -> Oracle:
    """The oracle that a transform makes, with its results checked."""
    oracle = transform.around(inner, context)
    if not callable(oracle):
        raise TypeError(
            f"{type(transform).__name__}.around returned a {type(oracle).__name__}; "
            "return the oracle"
        )
    numel = context.layout.numel

    def checked(at: Point | None = None, only: Container[str] | None = None) -> Gradients:
        return _checked(oracle(at, only), transform, numel)

    return checked


def _checked_weigher(transform: Reweighing, context: Context) -> Weigh:
    """The function by which a leading transform reweights, with its results checked."""
    weigh, numel = transform.weigher(context), context.layout.numel

    def checked(gradients: Gradients) -> Gradients:
        return _checked(weigh(gradients), transform, numel)

    return checked


def _checked(gradients: Gradients, transform: Transform, numel: int) -> Gradients:
    """What a transform has returned, if it is gradients that fit the weights."""
    name = type(transform).__name__
    if not isinstance(gradients, Gradients):
        raise TypeError(
            f"{name} returned a {type(gradients).__name__} in place of gradients; return the "
            "Gradients, or a changed copy, such as gradients.reweighted(factors)"
        )
    problem = gradients.misfit(numel)
    if problem is not None:
        raise ValueError(f"{name} returned {problem}")
    return gradients


def scaled_learning_rates(
    base: torch.optim.Optimizer, scale: Tensor | float | None
) -> AbstractContextManager[None]:
    """Multiply every group's learning rate by `scale`, if it is given, inside the block.

    A learning rate that is a tensor is changed in place, since optimizers and graphs keep a
    reference to it.

    Raises:
        ValueError: If `scale` is given and a group has no learning rate.
    """
    return nullcontext() if scale is None else _scaled(base, scale)


@contextmanager
def _scaled(base: torch.optim.Optimizer, scale: Tensor | float) -> Iterator[None]:
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
