"""The innermost oracle: the objectives' own gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Container, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize

from gradkit.core.context import Context
from gradkit.core.displacement import Displacement, Point
from gradkit.core.gradients import Gradients, Measurement
from gradkit.core.interrupts import Interrupts
from gradkit.core.random import RandomState
from gradkit.core.ranks import Ranks
from gradkit.core.samples import takes_samples
from gradkit.core.storage import Dense, Summed
from gradkit.core.transform import Weigh
from gradkit.engines.accumulation_check import AccumulationCheck
from gradkit.engines.backward import NO_CONTEXT, Receivers, take_grads
from gradkit.engines.loss_scale import LossScale
from gradkit.engines.objectives import (
    LOSS,
    GraphCheck,
    NoGradientError,
    NoLossError,
    Objectives,
    as_plain,
    checked_loss,
    computed_outside,
    freed_outside,
    kept_from_before,
    micro_batches,
)
from gradkit.engines.rows import Rows, no_gradient, stacked
from gradkit.engines.session import Session
from gradkit.engines.stream import streamed_gram

_NOT_JOINT = (
    "rows='stream' needs all losses before it back-propagates any: pass step() one closure that "
    "returns a mapping of losses, or rows='keep' to gk.wrap()"
)
_OWN_BACKWARD = (
    "the closure called backward and returned several losses, whose gradients can then no longer "
    "be told apart; return the losses only"
)
_OWN_SAMPLES = (
    "the closure called backward, so that no samples can be chosen; return the losses [N] only"
)


Result = TypeVar("Result")


class Evaluator:
    """The innermost oracle of a step, which evaluates the objectives in an engine's session.

    Attributes:
        found_gradient: Whether an objective has produced a gradient.
        unfrozen: By objective, the gradients of parameters that a closure has unfrozen in this
            step.
        first_losses: Each objective's loss at its first evaluation.
        unmeasured: Those of objectives that were not differentiated there.
        without_loss: The objectives whose closure called backward and returned no loss.
        measured: The losses and inner products of every evaluation.
        is_local: Whether gradients are this rank's own at present; see `locally`.
    """

    def __init__(
        self,
        objectives: Objectives,
        session: Session,
        context: Context,
        *,
        replay_rng: bool,
        measure: bool,
        interrupts: Interrupts,
        ranks: Ranks,
        settings: int,
        loss_scale: LossScale | None,
        weighers: Sequence[Weigh] = (),
        never_zero: bool = True,
        accumulated: Sequence[int] = (),
        beside: Sequence[Tensor] = (),
    ) -> None:
        self._closures = objectives if isinstance(objectives, Mapping) else None
        self._joint = None if isinstance(objectives, Mapping) else objectives
        self._session = session
        self._context = context
        self._draws: dict[str | None, RandomState] | None = {} if replay_rng else None
        self._measure = measure
        self._interrupts = interrupts
        self._ranks = ranks
        self._settings = settings
        self._loss_scale = loss_scale
        self._weighers = weighers
        self._never_zero = never_zero
        self._streams = context.streams if weighers or context.streams == "must" else "no"
        self._accumulation = AccumulationCheck(context.layout, accumulated)
        self._beside = beside
        self._had_gradient = {parameter for parameter in beside if parameter.grad is not None}
        self._check: GraphCheck  # of the closure that is running
        self.found_gradient = False
        self._is_displaced = False
        self.is_local = False
        self._outside: dict[str | None, Any] = {}
        if self._closures is not None:
            context.names = tuple(self._closures)
        self._evaluated: set[str | None] = set()
        self.unfrozen: dict[str, dict[Tensor, Tensor]] = {}
        self.first_losses: dict[str, Tensor] = {}
        self.unmeasured: dict[str, Tensor] = {}
        self.without_loss = context.without_loss
        self.measured: list[Measurement] = []

    # A method, not `__call__`: calling an instance keeps the arguments alive until it returns.
    def evaluate(
        self,
        at: Point | None = None,
        only: Container[str] | None = None,
    ) -> Gradients:
        """The gradients at the weights plus `at`, of all objectives or those in `only`.

        Where the step streams, the losses are weighted first and there is one backward pass.

        Args:
            at: A displacement; None for the weights themselves.
            only: The objectives to back-propagate; None for all.

        Raises:
            TypeError: If a closure returns something else than losses.
            ValueError: If a loss is not a real scalar, if there is no objective of a name in
                `only`, or if the objectives do not allow for streaming where it is required.
            NoGradientError: If an objective produced no gradient.
            RankError: If another rank has failed, or if the ranks differ where they must not.
            RuntimeError: If a closure's backward pass or graph cannot be used.
        """
        names = self._context.names
        if names is not None:
            _check_known(only, names)
        self._is_displaced = at is not None
        place = self._session.displaced(
            None if at is None else Displacement.of(at, self._context.layout)
        )
        del at  # free the point once the weights have been displaced
        with place as leaves, self._ranks.local_gradients():
            self._context.pool.note_use()
            if self._closures is None:
                rows, weighed = self._evaluate_jointly(leaves, only)
            elif self._streams == "must":
                raise ValueError(_NOT_JOINT)
            else:
                rows, weighed = self._evaluate_one_by_one(leaves, only), None
        self._finish(rows)
        gradients = rows.gradients()
        if weighed is not None:
            losses = stacked([rows.loss(name) for name in weighed.names], rows.device)
            together = self._together(weighed, losses, gradients)
            self.note(together)
            return together
        if self._context.by_tensor and len(gradients.names) > 1:
            gradients.gram("tensor")  # the global matrix is then their sum, without another pass
        self.note(gradients)
        return self._weigh(gradients)

    @contextmanager
    def locally(self) -> Iterator[None]:
        """A context in which gradients are this rank's own; losses are those of all ranks."""
        self.is_local = True
        try:
            yield
        finally:
            self.is_local = False

    def note(self, gradients: Gradients) -> None:
        """Note gradients, which will be checked for values that are not finite."""
        if self._measure:
            known = gradients.storage
            self.measured.append(
                _measured_together(gradients, known)
                if isinstance(known, Summed)
                else gradients.measured()
            )

    def _weigh(self, gradients: Gradients) -> Gradients:
        for weigh in self._weighers:
            gradients = weigh(gradients)
        return gradients

    @staticmethod
    def _together(weighed: Gradients, losses: Float[Tensor, " K"], total: Gradients) -> Gradients:
        """The weighted objectives, with the gradient of their weighted sum."""
        assert isinstance(weighed.storage, Summed)
        count = len(weighed.names)
        reached = None if total.reached is None else total.reached * count
        storage = weighed.storage.with_total(total.storage, count)
        return weighed.replace(rows=storage, losses=losses, reached=reached)

    def _finish(self, rows: Rows) -> None:
        self._ranks.check_clear(len(self._context.names or ()))
        scale = self._loss_scale
        device = self._context.layout.device
        rows.finish(
            self._ranks,
            self._settings,
            None if scale is None else scale.inverse(device),
            self._context.ascended,
            averages=self._ranks.averages and not self.is_local,
        )
        for name, loss, has_row in rows.losses:
            if name not in self.first_losses:
                self.first_losses[name] = loss
                if not has_row:
                    self.unmeasured[name] = loss
        self.without_loss |= rows.without_loss()
        self.unfrozen.update(rows.unfrozen)
        if self._context.ascends_everywhere:
            rows.negate_losses()

    def _evaluate_one_by_one(self, leaves: Sequence[Tensor], only: Container[str] | None) -> Rows:
        assert self._closures is not None
        names = tuple(name for name in self._closures if only is None or name in only)
        rows = Rows(names, leaves, self._context)
        for name in names:
            self._run(name, leaves, functools.partial(self._take_one, name, leaves, rows))
        return rows

    def _take_one(self, name: str, leaves: Sequence[Tensor], rows: Rows) -> None:
        assert self._closures is not None
        with micro_batches(self._call(self._closures[name], name)) as items:
            empty = True
            for item in items:
                empty = False
                if isinstance(item, Mapping):
                    raise ValueError(
                        f"objective {name!r} returned a mapping; pass the closure itself "
                        "to step() if it computes several objectives"
                    )
                self._back_propagate(name, {name: item}, (name,), rows, leaves)
                del item  # and its graph, before the next micro-batch is computed
            if empty:
                raise NoGradientError(
                    f"the closure of objective {name!r} produced no gradient: its generator "
                    "yielded nothing"
                )

    def _evaluate_jointly(
        self, leaves: Sequence[Tensor], only: Container[str] | None
    ) -> tuple[Rows, Gradients | None]:
        """The rows and None; or a single row, of the weighted sum, and the weighted objectives."""
        rows, weighed = self._run(None, leaves, functools.partial(self._take_jointly, leaves, only))
        if rows is None:
            raise NoGradientError("the closure produced no gradient: its generator yielded nothing")
        return rows, weighed

    def _take_jointly(
        self, leaves: Sequence[Tensor], only: Container[str] | None
    ) -> tuple[Rows | None, Gradients | None]:
        assert self._joint is not None
        rows: Rows | None = None
        weighed: Gradients | None = None
        returned = self._call(self._joint, LOSS)
        streams = self._streams != "no"
        if streams and isinstance(returned, Generator):
            if self._streams == "must":
                returned.close()
                raise ValueError(_NOT_JOINT)
            streams = False
        with micro_batches(returned) as items:
            del returned  # so that no name holds on to the losses
            for item in items:
                losses = item if isinstance(item, Mapping) else {LOSS: item}
                names = self._agree_on(tuple(losses), only)
                wanted = tuple(name for name in names if only is None or name in only)
                if streams and wanted and self._fits(losses):
                    rows, weighed = self._stream(losses, wanted, leaves)
                    continue
                if rows is None:
                    rows = Rows(wanted, leaves, self._context, losses=names)
                self._back_propagate(None, losses, wanted, rows, leaves)
                del item, losses  # and their graphs, before the next micro-batch is computed
        return rows, weighed

    def _fits(self, losses: Mapping[str, object]) -> bool:
        """Whether losses can be weighted before the backward pass.

        In half precision a weighted gradient may overflow during the backward pass, although a
        weighted row would not.
        """
        narrow = (torch.float16, torch.bfloat16)
        half = any(getattr(loss, "dtype", None) in narrow for loss in losses.values())
        return len(losses) > 1 and (self._streams == "must" or not half)

    def _stream(
        self,
        losses: Mapping[str, object],
        wanted: tuple[str, ...],
        leaves: Sequence[Tensor],
    ) -> tuple[Rows, Gradients]:
        """Weight the losses, then back-propagate their weighted sum."""
        total = f"weighted sum of {', '.join(wanted)}"
        rows = Rows((total,), leaves, self._context, losses=tuple(losses))
        checked = {name: self._checked(loss, name) for name, loss in losses.items()}
        for name, loss in checked.items():
            rows.add_loss(name, loss)
        self._accumulation.check(leaves, wanted[0], several=True)
        if self._collect(leaves) is not None:
            raise RuntimeError(_OWN_BACKWARD)
        chosen = []
        for name in wanted:
            loss = checked[name]
            if loss is None or not loss.requires_grad:
                raise NoGradientError(no_gradient(name, none=loss is None), loss)
            chosen.append(loss)
        together = stacked(chosen, rows.device)
        weighed = self._weigh(self._pending(wanted, together, leaves))
        if self._streams == "must" or not self._never_zero:
            active = list(weighed.active)
        else:  # without a copy from the device
            active = [k for k, name in enumerate(wanted) if name not in weighed.observers]
        if active:
            # Only of the active ones: parameters that no other graph reaches must get no gradient.
            summed = stacked([chosen[k] for k in active], rows.device)
            every = len(active) == len(wanted)
            weights = weighed.weights if every else weighed.weights[active]
            loss = (weights.to(summed.dtype) * summed).sum()
        else:
            loss = together.sum() * 0
        self._look_into(loss, None, total)
        scaled = loss if self._loss_scale is None else self._loss_scale.scaled(loss)
        self._differentiate(total, scaled, leaves, rows, retain_graph=False, receivers={})
        self._check.forget()
        return rows, weighed

    def _pending(
        self, names: tuple[str, ...], losses: Float[Tensor, " K"], leaves: Sequence[Tensor]
    ) -> Gradients:
        """The objectives before they are weighted and back-propagated."""
        device = self._context.layout.device
        values = -losses.detach() if self._context.ascends_everywhere else losses.detach().clone()
        if self._ranks.together:
            self._ranks.agree("losses", device, names=names)
            self._ranks.add_up(values).div_(self._ranks.size)

        def gram() -> Float[Tensor, "K K"]:
            if self._ranks.together:
                raise ValueError(
                    "rows='stream' takes inner products on one process only, and there are "
                    f"{self._ranks.size}; pass rows='keep' to gk.wrap()"
                )
            scale = self._loss_scale
            if scale is None:
                return streamed_gram(losses, leaves)
            products = streamed_gram(scale.scaled(losses), leaves)
            return products * scale.inverse(device).square()

        return Gradients(names, values, Summed(self._context.layout, gram))

    def _run(self, key: str | None, leaves: Sequence[Tensor], body: Callable[[], Result]) -> Result:
        """Run a body that calls a closure; `key` is its objective, None if joint."""
        first, known = key not in self._evaluated, self._outside.get(key)
        parameters = self._context.layout.parameters
        copied = leaves is not parameters
        every = (*leaves, *parameters) if copied else parameters
        self._check = check = GraphCheck(
            every if first else None, known, displaced=self._is_displaced, copied=copied
        )
        _forget_parametrizations()
        try:
            with self._drawing(key), self._session.running(keep_buffers=first):
                self._accumulation.place(leaves)
                with torch.enable_grad(), self._interrupts.allowed():
                    result = body()
        except RuntimeError as error:
            freed = "graph a second time" in str(error)
            if check.outside is not None and freed:
                raise RuntimeError(freed_outside(key or LOSS)) from error
            if freed and check.is_older and not first and known is None:
                raise RuntimeError(kept_from_before(key or LOSS)) from error
            unusable = freed or "modified by an inplace operation" in str(error)
            if known is None or not self._is_displaced or not unusable:
                raise
            raise RuntimeError(computed_outside(key or LOSS)) from error
        finally:
            _forget_parametrizations()
            self._accumulation.forget()
            check.close()
        if check.outside is not None:
            self._outside[key] = check.outside
        self._evaluated.add(key)
        return result

    def _call(self, closure: Callable[..., Any], name: str) -> Any:
        """What a closure returns; on the chosen samples only, if it takes `samples`.

        Raises:
            TypeError: If the closure takes `samples` and returns no tensor.
        """
        samples = self._context.samples
        if samples is None or not samples.chooses or not takes_samples(closure):
            return closure()
        with torch.no_grad():
            every: object = closure()
        torch.clear_autocast_cache()  # older versions of torch keep casts that have no graph
        if not isinstance(every, Tensor):
            raise TypeError(
                f"the closure of objective {name!r} takes samples= and returned a "
                f"{type(every).__name__}; return one loss per sample [N], or leave the argument out"
            )
        return closure(
            samples=samples.chosen(name, as_plain(every).to(self._context.layout.device))
        )

    def _checked(self, loss: object, name: str) -> Tensor | None:
        """An objective's loss as one number; per-sample losses where a transform asks for them."""
        samples = self._context.samples
        if samples is not None and isinstance(loss, Tensor) and loss.is_floating_point():
            loss = samples.scalar(name, as_plain(loss))
        return checked_loss(loss, name)

    def _drawing(self, key: str | None) -> AbstractContextManager[None]:
        """A context that replays the draws of a first evaluation if that was asked for."""
        if self._draws is None:
            return NO_CONTEXT
        now = RandomState.capture(self._context.layout.device)
        if key not in self._draws:
            self._draws[key] = now
            return NO_CONTEXT
        return self._replaying(self._draws[key], now)

    @staticmethod
    @contextmanager
    def _replaying(draws: RandomState, now: RandomState) -> Iterator[None]:
        draws.restore()
        try:
            yield
        finally:
            now.restore()

    def _agree_on(self, names: tuple[str, ...], only: Container[str] | None) -> tuple[str, ...]:
        """The objectives' names, which must not change within a step.

        Raises:
            TypeError: If a name is not a string.
            NoLossError: If there are no names.
            ValueError: If they have changed, or if `only` has another one.
        """
        if not names:
            raise NoLossError(
                "the closure returned an empty mapping of losses; take no step where a batch has "
                "none, or pass on_empty='skip' to gk.wrap()"
            )
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"the name of an objective is {name!r}; names are strings")
        known = self._context.names
        if known is None:
            self._context.names = known = names
        elif set(known) != set(names):
            raise ValueError(
                f"the closure returned the losses {', '.join(map(repr, names))} after "
                f"{', '.join(map(repr, known))} in the same step; return the same ones each time"
            )
        _check_known(only, known)
        return known

    def _back_propagate(
        self,
        key: str | None,
        losses: Mapping[str, object],
        wanted: tuple[str, ...],
        rows: Rows,
        leaves: Sequence[Tensor],
    ) -> None:
        checked = {name: self._checked(loss, name) for name, loss in losses.items()}
        for name, loss in checked.items():
            rows.add_loss(name, loss)
        self._accumulation.check(leaves, next(iter(checked)), several=len(checked) > 1)
        own = self._collect(leaves)
        if own is not None:
            if len(checked) > 1:
                raise RuntimeError(_OWN_BACKWARD)
            if self._context.samples is not None and self._context.samples.chooses:
                raise RuntimeError(_OWN_SAMPLES)
            ((name, loss),) = checked.items()
            if loss is not None:
                self._look_into(loss, key, name, differentiated=True)
                self._check.forget()
            self._add(name, own, leaves, rows)
            return
        pending = [name for name in wanted if name in checked]
        for name in pending:
            loss = checked[name]
            if loss is None or not loss.requires_grad:
                raise NoGradientError(no_gradient(name, none=loss is None), loss)
            self._look_into(loss, key, name)
            scaled = loss if self._loss_scale is None else self._loss_scale.scaled(loss)
            self._differentiate(
                name,
                scaled,
                leaves,
                rows,
                retain_graph=name != pending[-1],
                receivers=rows.receivers(name),
            )
        self._check.forget()

    def _differentiate(
        self,
        name: str,
        loss: Float[Tensor, ""],
        leaves: Sequence[Tensor],
        rows: Rows,
        *,
        retain_graph: bool,
        receivers: Receivers,
    ) -> None:
        wanted = [*leaves, *self._unfrozen()]
        grads = self._session.differentiate(
            loss, wanted, retain_graph=retain_graph, receivers=receivers
        )
        self._add(name, grads, leaves, rows)

    def _add(
        self, name: str, grads: list[Tensor | None], leaves: Sequence[Tensor], rows: Rows
    ) -> None:
        if len(grads) > len(leaves):
            rows.add_unfrozen(name, dict(zip(self._unfrozen(), grads[len(leaves) :], strict=True)))
            del grads[len(leaves) :]
        rows.add(name, grads)
        self.found_gradient = True

    def _unfrozen(self) -> list[Tensor]:
        """The optimizer's parameters that a closure has unfrozen in this step.

        They have no place in the flat vectors of the step.

        Raises:
            RuntimeError: If there are some and several ranks take the step together.
        """
        if not self._beside:
            return []
        found = [parameter for parameter in self._beside if parameter.requires_grad]
        if found and (self._ranks.together or self._context.layout.shards is not None):
            raise RuntimeError(
                "a closure has unfrozen a parameter, which the other ranks would have to know "
                "of; call requires_grad_(True) before step()"
            )
        return found

    def _collect(self, leaves: Sequence[Tensor]) -> list[Tensor | None] | None:
        """The gradients that the closure's own backward pass has left; None if there was none."""
        if self._loss_scale is not None:
            self._loss_scale.refuse_unscaled(in_closure=True)
        unfrozen = self._unfrozen()
        own = self._session.collect(leaves)
        fresh = [p for p in unfrozen if p.grad is not None and p not in self._had_gradient]
        if own is None and not fresh:
            return None
        return [*(own or [None] * len(leaves)), *take_grads(unfrozen)]

    def _look_into(
        self, loss: Tensor, key: str | None, name: str, *, differentiated: bool = False
    ) -> None:
        """Check that a loss's graph can be differentiated correctly.

        Raises:
            RuntimeError: If it holds a reentrant checkpoint, or if it was made outside the closure
                and the weights are displaced.
        """
        self._check.visit(loss, name, differentiated=differentiated)
        if self._check.outside is not None and self._is_displaced:
            raise RuntimeError(computed_outside(name))


def _measured_together(gradients: Gradients, known: Summed) -> Measurement:
    """The objectives' losses, and the norm of the gradient of their weighted sum."""
    names, losses = gradients.names, gradients.losses
    total = known.total or Dense(gradients.direction()[None], known.layout)
    square = total.gram("global", signs=False)[0, :1]
    squares = torch.cat([square.new_zeros(len(names)), square])
    return Measurement(
        (*names, f"weighted sum of {', '.join(names)}"),
        torch.cat([losses, losses.new_zeros(1)]),
        squares.diag(),
    )


def _forget_parametrizations() -> None:
    # Inside `torch.nn.utils.parametrize.cached()` the weights of another point would be reused.
    cache = getattr(parametrize, "_cache", None)
    if cache:
        cache.clear()


def _check_known(only: Container[str] | None, names: Sequence[str]) -> None:
    if not isinstance(only, Collection):
        return
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(
            f"there is no objective {unknown[0]!r}; there are {', '.join(map(repr, names))}"
        )
