"""The optimizer that transforms gradients before its base optimizer applies them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import warnings
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradkit.core.caller import caller_level
from gradkit.core.context import Context
from gradkit.core.flat import Layout, Pool
from gradkit.core.gradients import Gradients
from gradkit.core.interrupts import Interrupts
from gradkit.core.ranks import Ranks, reshard
from gradkit.core.transform import Transform
from gradkit.core.unwrapping import plainly_named
from gradkit.engines.choice import (
    ParameterPlaces,
    choose_engine,
)
from gradkit.engines.evaluator import Evaluator
from gradkit.engines.functional import FunctionalSession
from gradkit.engines.inplace import InplaceSession
from gradkit.engines.loss_scale import LossScale
from gradkit.engines.objectives import (
    LOSS,
    NoGradientError,
    NoLossError,
    Objectives,
    check_objectives,
)
from gradkit.engines.rows import stacked
from gradkit.engines.session import Session
from gradkit.engines.stored import StoredGradients
from gradkit.optimizer import state as saved_state
from gradkit.optimizer.bases import OptimizerSnapshot, check_group, sharing_kept, snapshot_of
from gradkit.optimizer.finite_check import Nonfinite, NonFiniteError, check_finite
from gradkit.optimizer.hooks import global_post_hooks, global_pre_hooks
from gradkit.optimizer.options import StepOptions
from gradkit.optimizer.record import StepRecord
from gradkit.optimizer.transaction import Transaction

_IDLE = (
    "step() had nothing to step on: {}. As with a bare optimizer nothing was changed, and "
    "last_step.applied is False. This warning is given once"
)
_ALONE = (
    "{!r} acts between objectives, and the step has one only, {!r}: pass step() a mapping of named "
    "objectives, unless the others have no loss in this batch. This warning is given once"
)

_STARTS_ANEW = (
    "the base optimizer holds state of the same transforms, from an earlier wrapper or loaded into "
    "the base; it is dropped, and they start anew. To go on with it, wrap first, and then load "
    "into the wrapped optimizer"
)


# Methods of other wrappers, for passes that are made by hand.
_BY_HAND = ("first_step", "second_step", "pc_backward")


class GradientOptimizer(Optimizer):
    """A torch optimizer that transforms gradients before its base applies them; made by `wrap`.

    `step` takes the objectives: a closure that returns a loss, a mapping from names to such
    closures, or a closure that returns a mapping from names to losses (one forward for all). A
    closure may be a generator function: each loss that it yields is one micro-batch, which is
    back-propagated and freed before the next. A closure may also call `backward` itself, as
    closures for torch's optimizers do.

    `param_groups`, `state` and `defaults` are the base's own, so learning-rate schedulers and
    checkpoints work. Further public methods of the base are available, too, such as `train` and
    `eval` of schedule-free optimizers.

    Attributes:
        base: The wrapped optimizer.
        transforms: The transforms, innermost first.
        options: The options passed to `wrap`.
        last_step: The record of the last step; None before the first.
    """

    def __init__(
        self,
        base: Optimizer,
        transforms: Sequence[Transform],
        options: StepOptions,
    ) -> None:
        # Not Optimizer.__init__, which would make param_groups and state beside the base's.
        self.base = base
        self.transforms = tuple(transforms)
        self.options = options
        self.last_step: StepRecord | None = None
        self._vector_layout: Layout | None = None
        # If the base's state dict has its own form, vectors are kept beside its state.
        self._beside: saved_state.Store | None = None
        if saved_state.has_own_form(base):
            self._beside = defaultdict(dict)
            saved_state.give_store(base, self._beside)
        self._prepare_scratch()
        model = options.model
        if options.engine == "functional":
            layout = Layout.of(base.param_groups)
            places = None if model is None else ParameterPlaces(model, layout)
            choose_engine(options.engine, places, layout)
        if model is not None and not _share_parameters(model, base):
            raise ValueError(
                "model= holds none of the parameters that the optimizer was made with, so that "
                "nothing of what closures do to its buffers could be undone; pass the module that "
                "is optimised"
            )
        for transform in transforms:
            transform.check_free(self)
        if saved_state.drop_earlier(self.transforms, base):
            warnings.warn(_STARTS_ANEW, UserWarning, stacklevel=caller_level())
        # The key is there from the start, since some checkpoint formats save only the keys that a
        # new optimizer has.
        self.base.param_groups[0][saved_state.KEY] = saved_state.encode(self.transforms)
        for transform in transforms:
            transform.belong_to(self)
        with contextlib.suppress(ValueError):  # parameters may still change before the first step
            self._present_layout()

    def _prepare_scratch(self) -> None:
        """Initialise the attributes that are neither copied nor saved."""
        self._pool: Pool | None = None
        self._places: ParameterPlaces | None = None
        self._names: tuple[str | int, ...] = ()
        self._owners: tuple[nn.Module | None, ...] = ()
        self._stepping = False
        self._applied = 0
        self._warned: set[str] = set()
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_state_dict_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_state_dict_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_load_state_dict_post_hooks: OrderedDict[int, Any] = OrderedDict()

    @property
    def model(self) -> nn.Module | None:
        """The module whose parameters are optimised, if it was passed to `wrap`."""
        return self.options.model

    @property
    def scaler(self) -> GradScaler | None:
        """The loss scaler that the step owns, if `wrap` was given one."""
        return self.options.scaler

    # The interface of torch's optimizers, delegated to the base. There are no aliases, since
    # loading a state dict replaces the base's lists and dicts by new ones.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups; inside a closure, those that the closure uses."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's state by parameter."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer.

        Raises:
            ValueError: If the group has `differentiable=True`.
        """
        check_group(param_group, len(self.param_groups), self.base)
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; inside a closure, those of the current evaluation."""
        arguments = inspect.signature(self.base.zero_grad).parameters.values()
        if any(each.name == "set_to_none" or each.kind is each.VAR_KEYWORD for each in arguments):
            self.base.zero_grad(set_to_none=set_to_none)
        else:
            self.base.zero_grad()

    if not TYPE_CHECKING:  # type checkers would otherwise accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Another public method of the base optimizer."""
            base = self.__dict__.get("base")
            found = None if base is None or name.startswith("_") else getattr(base, name, None)
            if inspect.isroutine(found):
                return found
            problem = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in _BY_HAND:
                problem += "; pass step() the closure, which it calls as often as it needs"
            raise AttributeError(problem)

    def __repr__(self) -> str:
        key = f"    {saved_state.KEY}: "
        lines = [line for line in repr(self.base).split("\n") if not line.startswith(key)]
        parts = ["\n".join(lines), *map(repr, self.transforms), *self.options.shown()]
        inside = ",\n".join(part.replace("\n", "\n  ") for part in parts)
        return f"{type(self).__name__}(\n  {inside}\n)".replace(",\n", ",\n  ")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("transforms", "options", "last_step", "_vector_layout", "_beside")
        return {**{name: self.__dict__[name] for name in kept}, "base": snapshot_of(self.base)}

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientOptimizer:
        group = self.options.process_group
        memo[id(group)] = group  # a connection, which has no copy
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.base, OptimizerSnapshot):
            self.base = self.base.restored()
        if self._beside is not None:
            saved_state.give_store(self.base, self._beside)
        self._prepare_scratch()
        for transform in self.transforms:
            transform.belong_to(self)
        # Pickle copies each tensor separately, so that views are no longer views.
        if self._vector_layout is not None:
            saved_state.relink(self.transforms, self._vector_layout, self.base)

    # The step.

    @_disable_dynamo  # as torch's own; the model's calls inside are compiled all the same
    def step(self, closure: Objectives | None = None) -> Tensor | None:  # type: ignore[override]  # takes mappings too
        """Evaluate the objectives, transform their gradients, and let the base optimizer step.

        If anything raises before the base optimizer steps, also inside a closure, weights, buffers,
        gradients, state, learning rates and random number generators keep their values from before
        the step, except in-place writes to weights by the closure. Ctrl-C acts while closures run,
        and is otherwise delayed until the end of the step.

        Args:
            closure: The objectives (see the class); None steps on the gradients in `.grad`.

        Returns:
            The sum of the objectives' first losses in this step, detached [] (NaN if a closure
            returned None); None without a closure.

        Raises:
            TypeError: If the objectives, or what closures and transforms return, are of the wrong
                type.
            ValueError: If the objectives do not fit the transforms or options.
            NoGradientError: If one of several objectives produced no gradient and `on_empty` is
                "raise".
            NonFiniteError: If a loss, gradient or weight is not finite and `nonfinite` is "raise".
            RankError: If another rank has failed, or if the ranks differ where they must not.
            RuntimeError: If a transform needs a closure and there is none, if closures call
                `backward` in a way that cannot be evaluated, or if `step` is called from inside a
                closure or under `torch.inference_mode()`.
        """
        closure = self._after_pre_hooks(closure)
        loss, warning = self._step(closure)
        for after in [*self._optimizer_step_post_hooks.values(), *global_post_hooks()]:
            after(self, (self, closure), {})
        if warning is not None:  # last, since it may be an error where warnings are
            self._warn(*warning)
        return loss

    def _after_pre_hooks(self, closure: Objectives | None) -> Objectives | None:
        """The closure after the pre-hooks of the step, which may replace it.

        Raises:
            RuntimeError: If a hook returns something else than None or new arguments.
            ValueError: If a parameter group has `differentiable=True`.
        """
        try:
            for number, group in enumerate(self.base.param_groups):
                check_group(group, number, self.base)
            for before in [*global_pre_hooks(), *self._optimizer_step_pre_hooks.values()]:
                changed = before(self, (self, closure), {})
                if changed is not None:
                    if not isinstance(changed, tuple) or len(changed) != 2:
                        raise RuntimeError(
                            f"a step pre-hook returned {changed!r}; it must return None or a "
                            "tuple of new arguments and new named arguments"
                        )
                    arguments, named = changed
                    rest = arguments[1:] or (None,)
                    closure = named["closure"] if "closure" in named else rest[0]
        except BaseException as error:
            if not self._stepping:
                with contextlib.suppress(ValueError):  # the hook's own error says more
                    layout = self._present_layout()
                    ranks = Ranks.of(self.model, layout.shards, self.options.process_group)
                    ranks.report(error, layout.device)
            raise
        return closure

    @_disable_dynamo
    def gradients(
        self,
        objectives: Objectives,
        at: Float[Tensor, " P"] | None = None,
        only: Sequence[str] | None = None,
    ) -> Gradients:
        """The objectives' own gradients, before any transform, without a step.

        Weights, buffers, gradients and state are not changed; random number generators advance.

        Args:
            objectives: As for `step`.
            at: A flat displacement of the weights [P]; None evaluates at the weights themselves.
            only: The objectives to back-propagate; None for all.

        Raises:
            TypeError: If the objectives, or what closures return, are of the wrong type.
            ValueError: If a loss is not a real scalar, if there is no objective of a name in
                `only`, or if `at` has another length than the weights.
            NoGradientError: If a closure produced no gradient.
            RankError: If another rank has failed, or if the ranks differ where they must not.
            RuntimeError: If this is called from inside a closure or under `torch.inference_mode()`.

        Examples:
            >>> import torch, gradkit as gk
            >>> w = torch.nn.Parameter(torch.tensor([3.0]))
            >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1))
            >>> optimizer.gradients(lambda: w.square().sum(), at=torch.tensor([1.0])).rows
            tensor([[8.]])
        """
        with self._transaction() as transaction:
            check_objectives(objectives)
            try:
                transaction.fields.set_aside()
                transaction.context.ascended = ()  # whether or not the base maximises
                transaction.context.streams = "no"
                found = transaction.evaluator(objectives).evaluate(at, only)
                return found.with_parameter_names(transaction.context.parameter_names)
            finally:
                transaction.undo(rng=False)

    def _parameter_names(self, layout: Layout) -> tuple[str | int, ...]:
        """Each parameter's name in the model or the base optimizer, or else its position.

        Names are the same whether or not the model is compiled or `DistributedDataParallel`.
        """
        names: dict[Tensor, str | int] = {}
        for group in self.base.param_groups:
            names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        if self.model is not None:
            names.update((p, name) for name, p in plainly_named(self.model))
        return tuple(names.get(p, t) for t, p in enumerate(layout.parameters))

    def _step(self, closure: Objectives | None) -> tuple[Tensor | None, tuple[str, str] | None]:
        """The loss, and the warning to give after the step: its kind and text."""
        with self._transaction() as transaction:
            scale = self._loss_scale
            if scale is not None:
                scale.refuse_unscaled()
            if closure is not None:
                check_objectives(closure)
            elif transaction.can_only_initialise():
                transaction.initialise(self.transforms)
                if not transaction.has_no_gradient:
                    return None, None
                self._record_idle(transaction, None)
                return None, ("idle", _IDLE.format("no parameter has a gradient"))
            if closure is None and scale is not None:
                raise RuntimeError(
                    "this optimizer scales losses itself (scaler=), so that it cannot know the "
                    "scale of gradients that are there already; pass step() a closure"
                )
            nonfinite = self.options.nonfinite if scale is None else "skip"
            try:
                transaction.fields.set_aside()
                try:
                    gradients, source = self._evaluate(transaction, closure, nonfinite)
                except NoGradientError as error:
                    if self.options.on_empty == "skip":
                        return self._skip_empty(transaction, error.loss), None
                    if isinstance(error, NoLossError) or not transaction.may_be_idle():
                        raise
                    transaction.idle()
                    self._record_idle(transaction, error.loss)
                    given = None if error.loss is None else error.loss.detach()
                    return given, ("idle", _IDLE.format(error))
                check = check_finite(gradients, source, nonfinite, self.base, self._objection)
                if check.problem is None:
                    gradients = gradients.without_spent_rows()
                    direction = transaction.direction(gradients, self.options.max_norm)
                    for transform in self.transforms:
                        transform.before_step(transaction.context)
                transaction.ranks.agree("step", transaction.context.layout.device)
                if check.problem is None:
                    if closure is not None:
                        transaction.fields.average_others(transaction.ranks)
                    transaction.apply(
                        gradients, direction, check.scale, check.weights, self.transforms
                    )
                else:
                    transaction.undo(rng=False)
            except BaseException:
                if not transaction.applied:
                    transaction.undo(rng=True)
                raise
            if scale is not None:
                overflowed = check.problem is not None
                scale.update(transaction.context.layout.device, overflowed=overflowed)
            self._applied += transaction.applied
            losses = stacked([*source.first_losses.values()], transaction.context.layout.device)
            self._record(transaction, gradients, source, losses)
            alone = [each for each in self.transforms if each.needs_several]
            warning = None
            if len(gradients.names) > 1:
                self._warned.add("alone")  # an objective may be absent now and then
            elif alone:
                warning = ("alone", _ALONE.format(alone[0], gradients.names[0]))
            return None if closure is None else losses.sum(), warning

    def _skip_empty(self, transaction: Transaction, loss: Tensor | None) -> Tensor | None:
        """Undo a step whose objectives have left nothing to step on."""
        transaction.ranks.agree("idle", transaction.context.layout.device)
        transaction.undo(rng=False)
        self._record_idle(transaction, loss)
        return None if loss is None else loss.detach()

    def _warn(self, kind: str, text: str) -> None:
        """Warn, once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, UserWarning, stacklevel=caller_level())

    def _evaluate(
        self, transaction: Transaction, closure: Objectives | None, nonfinite: Nonfinite
    ) -> tuple[Gradients, Evaluator | StoredGradients]:
        """The transforms' gradients, or the source's own gradients if the transforms fail on NaNs.

        Code that meets NaNs, for example at weights displaced along a gradient that is not finite,
        may raise any error. Such a step counts as not finite.

        Raises:
            NonFiniteError: If something is not finite and `nonfinite` is "raise".
        """
        try:
            gradients = transaction.evaluate(closure, self.transforms)
            assert transaction.source is not None  # made by evaluate()
            return gradients, transaction.source
        except Exception as error:
            source = transaction.source
            if nonfinite == "ignore" or source is None or not source.measured:
                raise
            last = source.measured[-1].as_gradients()
            try:
                problem = check_finite(last, source, nonfinite, self.base, self._objection).problem
            except NonFiniteError as found:
                raise found from error
            if problem is None:
                raise
            return last, source

    def _objection(self, losses: Mapping[str, float]) -> str | None:
        """Why a transform cannot work with these losses; None if all can."""
        found = (transform.objection(losses) for transform in self.transforms)
        return next((reason for reason in found if reason is not None), None)

    @contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        if self._stepping:
            raise RuntimeError(
                "a step of this optimizer is under way: step() was called from inside one of its "
                "closures, which only compute losses, or from another thread"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step() cannot take gradients inside torch.inference_mode(); leave that block, "
                "or use torch.no_grad()"
            )
        interrupts = Interrupts()
        interrupts.begin()
        first, transaction = self._vector_layout is None, None
        try:
            layout = self._layout()
            ranks = Ranks.of(self.model, layout.shards, self.options.process_group)
            self._stepping = True
            try:
                transaction = self._make_transaction(layout, ranks, interrupts)
                with torch.no_grad():
                    yield transaction
            except BaseException as error:
                if transaction is None or not transaction.applied:
                    ranks.report(error, layout.device)
                raise
        finally:
            if first and (transaction is None or not transaction.applied):
                self._forget_vectors()  # weights may still change before the first step
            self._stepping = False
            interrupts.end()

    @property
    def _by_tensor(self) -> bool:
        return any(getattr(each, "scope", None) in ("tensor", "shared") for each in self.transforms)

    def _frozen(self) -> list[Tensor]:
        """The parameters of the optimizer and the model that do not require a gradient."""
        grouped = [p for group in self.base.param_groups for p in group["params"]]
        others = [] if self._places is None else self._places.frozen
        return [p for p in dict.fromkeys((*grouped, *others)) if not p.requires_grad]

    @property
    def _loss_scale(self) -> LossScale | None:
        scaler = self.options.scaler
        if scaler is None or not scaler.is_enabled():
            return None
        return LossScale(scaler, owners=(self, self.base))

    def _settings(self, ranks: Ranks, layout: Layout) -> int:
        """A hash that is equal on ranks that would take the same step on the same gradients."""
        if not ranks.together:
            return 0
        rates = [group.get("lr") for group in self.base.param_groups]
        numbers = [None if rate is None else float(rate) for rate in rates]
        every = () if self.model is None else self.model.parameters()
        order: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(every)}
        places = [(order.get(p), tuple(p.shape)) for p in layout.parameters]
        state = saved_state.encode(self.transforms)
        facts = (
            numbers,
            places,
            self._applied,
            self.options.max_norm,
            self.options.nonfinite,
            self.options.on_empty,
            state,
        )
        return zlib.crc32(repr(facts).encode())

    def _make_transaction(
        self, layout: Layout, ranks: Ranks, interrupts: Interrupts
    ) -> Transaction:
        assert self._pool is not None  # made by _layout()
        self._pool.trim()
        model, places = self.model, self._places
        if places is not None and places.check_current():
            self._names, self._owners = self._parameter_names(layout), _owners(model, layout)
        scale = self._loss_scale
        if scale is not None and layout.has(torch.float16):
            raise ValueError(
                "parameters are float16, whose gradients lose what the loss scale has saved as "
                "soon as it is divided out again; keep them float32 and compute under "
                "torch.autocast"
            )
        engine = choose_engine(self.options.engine, places, layout)
        if engine == "functional" and places is not None:
            session: Session = FunctionalSession(layout, self._pool, places, self.base)
        else:
            session = InplaceSession(layout, self._pool, model, places)
        return Transaction(
            self.base,
            session,
            Context(
                layout,
                self._pool,
                self.base,
                streams=self.options.streams(self.transforms),
                by_tensor=self._by_tensor,
                ascended=self._ascended(layout),
                parameter_names=self._names,
                owners=self._owners,
                model=self.model,
            ),
            generators=[transform.generator for transform in self.transforms],
            others=[] if places is None else places.others,
            ranks=ranks,
            buffers=[] if model is None else model.buffers(),
            frozen=self._frozen(),
            make_evaluator=functools.partial(
                Evaluator,
                replay_rng=self.options.replay_rng,
                measure=self.options.nonfinite != "ignore" or scale is not None,
                interrupts=interrupts,
                ranks=ranks,
                settings=self._settings(ranks, layout),
                loss_scale=scale,
            ),
        )

    def _ascended(self, layout: Layout) -> tuple[int, ...]:
        """The positions of parameters in groups with `maximize`."""
        flags = [bool(group.get("maximize", False)) for group in self.base.param_groups]
        if not any(flags):
            return ()
        return tuple(t for t, group in enumerate(layout.groups) if flags[group])

    def _record_idle(self, transaction: Transaction, loss: Tensor | None) -> None:
        """Record a step in which there was nothing to step on."""
        device = transaction.context.layout.device
        names = transaction.context.names or (LOSS,)
        unknown = torch.full((), torch.nan, device=device)
        losses = [unknown if loss is None or len(names) > 1 else loss.detach() for _ in names]
        self.last_step = StepRecord(
            names=names,
            losses=stacked(losses, device),
            applied=False,
            _gram=torch.zeros(len(names), len(names), device=device),
            _weights=[1.0] * len(names),
            _lr_scale=1.0,
            _gate=None,
            _gate_cosine=None,
            _gate_rate=None,
            _decay=None,
        )

    def _record(
        self,
        transaction: Transaction,
        gradients: Gradients,
        source: Evaluator | StoredGradients,
        losses: Float[Tensor, " K"],
    ) -> None:
        """Record the step; `losses` are the source's first ones."""
        firsts = source.first_losses
        if gradients.names != tuple(firsts):
            losses = stacked([firsts[name] for name in gradients.names], losses.device)
        context, weights = transaction.context, gradients.known_weights
        self.last_step = StepRecord(
            names=gradients.names,
            losses=losses,
            applied=transaction.applied,
            _gram=gradients.seen_gram,
            _weights=gradients.weights if weights is None else weights,
            _lr_scale=gradients.lr_scale if gradients.scales_lr else 1.0,
            _gate=context.gate,
            _gate_cosine=context.gate_cosine,
            _gate_rate=context.gate_rate,
            _decay=context.decay,
        )

    def _layout(self) -> Layout:
        """The present layout; when it changes, transforms' vectors are moved to it."""
        layout = self._present_layout()
        if self._vector_layout is None or not self._vector_layout.same_as(layout):
            saved_state.lay_out_vectors(self.transforms, self._vector_layout, layout, self.base)
            self._vector_layout = layout
        return layout

    def _forget_vectors(self) -> None:
        for transform in self.transforms:
            transform.vectors.clear()
        self._vector_layout = None

    def _present_layout(self) -> Layout:
        if self._pool is not None and self._pool.layout.fits(self.base.param_groups):
            return self._pool.layout  # of plain tensors, of which nothing can be gathered
        if self.model is not None:
            reshard(self.model.modules())
        return self._new_layout(Layout.of(self.base.param_groups))

    def _new_layout(self, layout: Layout) -> Layout:
        if self._pool is not None and self._pool.layout.same_as(layout):
            return self._pool.layout
        if self._pool is not None:
            self._refuse_changed(self._pool.layout, layout)
        places = None if self.model is None else ParameterPlaces(self.model, layout)
        if self.options.engine == "functional":
            choose_engine(self.options.engine, places, layout)
        self._pool, self._places = Pool(layout), places
        self._names = self._parameter_names(layout)
        self._owners = _owners(self.model, layout)
        return layout

    def _refuse_changed(self, old: Layout, new: Layout) -> None:
        """Check that the base optimizer's state still fits the parameters.

        Raises:
            ValueError: If a parameter with state has changed its shape or dtype.
        """
        before = {p: (old.shapes[t], old.dtypes[t]) for t, p in enumerate(old.parameters)}
        for t, parameter in enumerate(new.parameters):
            held = self.base.state.get(parameter) or {}
            if parameter not in before or not any(not saved_state.is_own(key) for key in held):
                continue
            shape, dtype = before[parameter]
            for what, was, now in (
                ("shape", shape, new.shapes[t]),
                ("dtype", dtype, parameter.dtype),
            ):
                if was != now:
                    raise ValueError(
                        f"parameter {t} changed its {what} from {was} to {now}, and the base "
                        "optimizer's state no longer fits; make a new optimizer"
                    )

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, which includes the transforms' state.

        It holds plain values and tensors only, so it can be loaded with `weights_only=True`. Save
        teachers separately, as modules, unless they have `in_state=True`.
        """
        for pre in list(self._optimizer_state_dict_pre_hooks.values()):
            pre(self)
        text = saved_state.encode(self.transforms, marks=True)
        self.base.param_groups[0][saved_state.KEY] = text
        layout = self._layout_of_state()
        # Other code may have replaced the base's state by copies, as moving it to a device does.
        if layout is None:
            saved_state.renew_tensors(self.transforms, self.base)
        else:
            saved_state.relink(self.transforms, layout, self.base)
        state: dict[str, Any] = self.base.state_dict()
        self.base.param_groups[0][saved_state.KEY] = saved_state.encode(self.transforms)
        if self._beside is not None:
            own = saved_state.beside(self.transforms, layout, self.base)
            state = {**state, saved_state.KEY: own}
        else:
            saved_state.add_unlinked_tensors(state, self.transforms, self.base.param_groups)
            if layout is not None:
                saved_state.add_unlinked_vectors(
                    state, self.transforms, layout, self.base.param_groups
                )
        for post in list(self._optimizer_state_dict_post_hooks.values()):
            changed = post(self, state)
            if changed is not None:
                state = changed
        return state

    def _layout_of_state(self) -> Layout | None:
        """The layout of the transforms' vectors, of the parameters that are in the groups now.

        In a closure those are the functional engine's copies.
        """
        layout = self._vector_layout
        if layout is None or not self._stepping:
            return layout
        grouped = (p for group in self.base.param_groups for p in group["params"])
        present = tuple(p for p in grouped if p.requires_grad)
        copied = [p.shape for p in present] == [p.shape for p in layout.parameters]
        if not copied or not set(present).isdisjoint(layout.parameters):
            return layout
        return dataclasses.replace(layout, parameters=present)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, or the state dict of a bare base optimizer.

        Raises:
            TypeError: If it is not a mapping.
            ValueError: If it is incomplete, or belongs to other transforms or parameters; nothing
                is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"the saved state is a {type(state_dict).__name__}, which is no state dict; pass "
                "what state_dict() returned"
            )
        state_dict = dict(state_dict)
        for pre in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = pre(self, state_dict)
            if changed is not None:
                state_dict = changed
        for key in ("state", "param_groups"):
            if self._beside is None and key not in state_dict:
                raise ValueError(
                    f"the saved state is incomplete: it lacks {key!r}; pass what state_dict() "
                    "returned"
                )
        if self._beside is None:
            saved = saved_state.split(state_dict)
        else:
            saved = saved_state.split_beside(state_dict, self.base)
        text = saved.text
        if text is not None:
            saved_state.check(text, self.transforms)
        tensors, stepped = saved_state.take_tensors(saved.vectors)
        saved_state.check_tensors(tensors, self.transforms)
        saved_state.check_vectors(self.base.param_groups, saved.vectors, saved.groups)
        for number, group in enumerate(saved.groups):
            check_group(group, number, self.base)
        with sharing_kept(self.base):
            self.base.load_state_dict(saved.theirs)
        if self._beside is not None:
            self._beside.clear()
        if text is not None:
            saved_state.decode(text, self.transforms)
        saved_state.load_tensors(tensors, text, self.transforms)
        identities = saved_state.identities(self.base.param_groups, saved.groups)
        held = [parameter for parameter, identity in identities.items() if identity in stepped]
        saved_state.renew_tensors(self.transforms, self.base, held)
        self.base.param_groups[0][saved_state.KEY] = saved_state.encode(self.transforms)
        self._forget_vectors()
        self._pool = None
        self._applied = 0
        loaded = saved_state.store_vectors(
            self.base.param_groups, saved.vectors, saved.groups, self.base
        )
        if loaded:
            layout = self._layout()
            saved_state.lay_out_vectors(self.transforms, layout, layout, self.base, loaded)
        for post in list(self._optimizer_load_state_dict_post_hooks.values()):
            post(self)
        for transform in self.transforms:
            transform.after_load()


def _share_parameters(model: nn.Module, base: Optimizer) -> bool:
    own = set(map(id, model.parameters()))
    return any(id(parameter) in own for group in base.param_groups for parameter in group["params"])


def _owners(model: nn.Module | None, layout: Layout) -> tuple[nn.Module | None, ...]:
    """The module that holds each parameter."""
    found: dict[Tensor, nn.Module] = {}
    for module in () if model is None else model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(parameter, module)
    return tuple(found.get(parameter) for parameter in layout.parameters)
