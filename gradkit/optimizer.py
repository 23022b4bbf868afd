"""The optimizer that bends gradients before its base optimizer applies them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from gradkit import state as saved_state
from gradkit.attempt import Attempt
from gradkit.engines.choice import (
    ENGINES,
    EngineName,
    ParameterNames,
    choose_engine,
    refuse_processes,
)
from gradkit.engines.evaluator import Evaluator, StoredGradients
from gradkit.engines.functional import FunctionalSession
from gradkit.engines.inplace import InplaceSession
from gradkit.flat import Layout, Pool
from gradkit.interrupts import deferred_interrupts
from gradkit.objectives import Objectives, check_objectives
from gradkit.oracle import Context, Gradients, Transform
from gradkit.record import StepRecord

Nonfinite = Literal["raise", "skip", "ignore"]
NONFINITE: tuple[Nonfinite, ...] = ("raise", "skip", "ignore")


class NonFiniteError(FloatingPointError, RuntimeError):
    """A loss or a gradient is NaN or infinite."""


def wrap(
    base: Optimizer,
    *transforms: Transform,
    model: nn.Module | None = None,
    engine: EngineName = "auto",
    nonfinite: Nonfinite = "raise",
    max_norm: float | None = None,
    replay_rng: bool = False,
) -> GradientOptimizer:
    """Wrap an optimizer, so that transforms bend its gradient on the way in.

    Args:
        base: Any `torch.optim.Optimizer` that steps on plain gradients; not to be stepped by
            itself from then on.
        transforms: Applied in this order: the first works on the objectives' own gradients,
            each further one around those before it.
        model: The module whose parameters are optimised. With it, buffers such as BatchNorm's
            running statistics see each objective's first evaluation in a step and no other, and
            the functional engine can be used.
        engine: "functional" runs closures on a copy of the parameters and never writes to the
            live ones; "inplace" displaces them and puts them back, which also runs parameter
            hooks and compiled modules; "auto" is functional where that is possible.
        nonfinite: On a NaN or an infinity in a loss or gradient, "raise" names the objective,
            "skip" leaves everything but the random numbers as it was, "ignore" does not look
            (and needs no copy to the host).
        max_norm: Clip the final direction to this Euclidean norm, after all transforms.
        replay_rng: Whether further evaluations of an objective in a step, at displaced weights,
            see the same random numbers (dropout masks) as its first; by default they draw fresh
            ones, as torch would.

    Returns:
        The optimizer; see `GradientOptimizer`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value or the transforms cannot follow each other.

    Example:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> gk.wrap(base, gk.PCGrad(), gk.SAM(rho=0.05), model=model).transforms[1]
        SAM(rho=0.05)
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; pass a torch.optim.Optimizer")
    if isinstance(base, GradientOptimizer):
        raise ValueError(
            "base is a gradkit optimizer already; pass all transforms to one wrap() instead"
        )
    if isinstance(base, LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times inside its own step, which transforms cannot "
            "see; wrap a first-order optimizer such as SGD or Adam"
        )
    if isinstance(base, SparseAdam):
        raise ValueError(
            "SparseAdam takes sparse gradients only, and flat vectors are dense; wrap Adam"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the torch.nn.Module")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; choose one of {', '.join(ENGINES)}")
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite is {nonfinite!r}; choose one of {', '.join(NONFINITE)}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive, or None for no clipping")
    _check_chain(transforms)
    return GradientOptimizer(
        base,
        transforms,
        model=model,
        engine=engine,
        nonfinite=nonfinite,
        max_norm=max_norm,
        replay_rng=replay_rng,
    )


def _check_chain(transforms: Sequence[Transform]) -> None:
    from gradkit.surgery.rule import Rule

    last: Transform | None = None
    for position, transform in enumerate(transforms):
        if isinstance(transform, type) and issubclass(transform, Transform):
            raise TypeError(f"{transform.__name__} is a class; write {transform.__name__}()")
        if not isinstance(transform, Transform):
            raise TypeError(
                f"a transform is a {type(transform).__name__}; pass gradkit transforms, and the "
                "model as model="
            )
        if any(transform is other for other in transforms[:position]):
            raise ValueError(
                f"{transform!r} is passed twice; make two objects, since each keeps its own state"
            )
        if isinstance(transform, Rule):
            if last is not None:
                raise ValueError(
                    f"{transform!r} cannot follow {last!r}, whose result is no weighted sum of "
                    "whole gradients; put it first"
                )
            if transform.sets_update:
                last = transform


class GradientOptimizer(Optimizer):
    """A torch optimizer that bends the gradient before its base applies it; made by `wrap`.

    `step` takes the objectives: a closure that returns a loss, a mapping from names to such
    closures, or a closure that returns a mapping from names to losses (one forward for all). A
    closure may be a generator function: each loss it yields is one micro-batch, back-propagated
    and freed before the next. A closure may also call `backward` itself, as torch's do.

    `param_groups`, `state` and `defaults` are the base's own, so learning-rate schedulers,
    checkpoints and gradient scalers find what they expect.

    Attributes:
        base: The wrapped optimizer.
        transforms: The transforms, innermost first.
        last_step: What happened in the last step; None before the first.
    """

    def __init__(
        self,
        base: Optimizer,
        transforms: Sequence[Transform],
        *,
        model: nn.Module | None,
        engine: EngineName,
        nonfinite: Nonfinite,
        max_norm: float | None,
        replay_rng: bool,
    ) -> None:
        # Optimizer.__init__ would build param_groups and state of its own beside the base's.
        self.base = base
        self.transforms = tuple(transforms)
        self.model = model
        self.engine = engine
        self.nonfinite = nonfinite
        self.max_norm = max_norm
        self.replay_rng = replay_rng
        self.last_step: StepRecord | None = None
        self._vector_layout: Layout | None = None
        self._prepare_scratch()
        # Whoever looks at the groups finds the key from the start: some checkpoint formats save
        # only the keys that a freshly made optimizer shows.
        self.base.param_groups[0][saved_state.KEY] = saved_state.encode(self.transforms)
        if engine == "functional":
            layout = Layout.of(base.param_groups)
            names = None if model is None else ParameterNames(model, layout)
            choose_engine(engine, model, names, layout)

    def _prepare_scratch(self) -> None:
        """Make what is neither copied nor saved."""
        self._pool: Pool | None = None
        self._names: ParameterNames | None = None
        self._stepping = False
        self._session: FunctionalSession | InplaceSession | None = None
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_state_dict_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_state_dict_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_load_state_dict_post_hooks: OrderedDict[int, Any] = OrderedDict()

    # What torch code expects of an optimizer, delegated to the base. Nothing is aliased: loading
    # a state dict replaces the base's lists and dicts by new ones.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
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
        """Add a parameter group to the base optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; inside a closure, those of the evaluation under way."""
        if isinstance(self._session, FunctionalSession):
            self._session.zero_grad()
        else:
            self.base.zero_grad(set_to_none=set_to_none)

    def __repr__(self) -> str:
        parts = [repr(self.base), *map(repr, self.transforms)]
        inside = ",\n".join(part.replace("\n", "\n  ") for part in parts)
        return f"{type(self).__name__}(\n  {inside}\n)".replace(",\n", ",\n  ")

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "base", "transforms", "model", "engine", "nonfinite", "max_norm", "replay_rng",
            "last_step", "_vector_layout",
        )  # fmt: skip
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_scratch()

    # The step.

    def step(self, closure: Objectives | None = None) -> Tensor | None:  # type: ignore[override]  # takes mappings too
        """Evaluate the objectives, bend their gradients, and let the base optimizer step.

        Args:
            closure: The objectives (see the class); None steps on what `.grad` holds.

        Returns:
            The sum of each objective's first loss in this step, detached [] (NaN if a closure
            returned None); None without a closure.

        Raises:
            RuntimeError: If a closure produced no gradient, if a transform needs a closure and
                there is none, or if `step` is called from inside a closure.
            NonFiniteError: If a loss or gradient is not finite and `nonfinite` is "raise".
            ValueError: If the objectives do not fit the transforms.

        Whatever is raised, by a closure too, weights, buffers, gradients, states, learning rates
        and random number generators are left as they were.
        """
        for hook in list(self._optimizer_step_pre_hooks.values()):
            changed = hook(self, (closure,), {})
            if changed is not None:
                (closure,), _ = changed
        loss = self._step(closure)
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (closure,), {})
        return loss

    def gradients(
        self,
        objectives: Objectives,
        at: Float[Tensor, " P"] | None = None,
        only: Sequence[str] | None = None,
    ) -> Gradients:
        """The objectives' own gradients, before any transform, without stepping.

        Weights, buffers, gradients and states stay as they are; the random number generators
        advance.

        Args:
            objectives: As for `step`.
            at: A flat displacement of the weights [P]; None for none.
            only: The objectives to back-propagate; None for all.

        Example:
            >>> import torch, gradkit as gk
            >>> w = torch.nn.Parameter(torch.tensor([3.0]))
            >>> optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1))
            >>> optimizer.gradients(lambda: w.square().sum(), at=torch.tensor([1.0])).rows
            tensor([[8.]])
        """
        check_objectives(objectives)
        with self._attempt() as attempt:
            try:
                with attempt.evaluating():
                    return attempt.evaluator(objectives)(at, only)
            finally:
                attempt.undo(rng=False)

    def _step(self, closure: Objectives | None) -> Tensor | None:
        if closure is not None:
            check_objectives(closure)
        with self._attempt() as attempt:
            if closure is None and attempt.initialise_only(self.transforms):
                return None
            try:
                with attempt.evaluating():
                    gradients, source = attempt.evaluate(closure, self.transforms)
                    finite, scale = self._verdict(gradients, source)
                    direction = attempt.direction(gradients, self.max_norm) if finite else None
                with deferred_interrupts():
                    if direction is None:
                        attempt.undo(rng=False)
                    else:
                        attempt.apply(gradients, direction, scale, self.transforms)
                    self._record(attempt.context, gradients, source, applied=finite)
            except BaseException:
                if not attempt.applied:
                    attempt.undo(rng=True)
                raise
            if closure is None:
                return None
            return torch.stack([*source.first_losses.values()]).sum()

    @contextmanager
    def _attempt(self) -> Iterator[Attempt]:
        if self._stepping:
            raise RuntimeError(
                "step() was called from inside a closure of the same optimizer; a closure only "
                "computes losses"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step() cannot take gradients inside torch.inference_mode(); leave that block, "
                "or use torch.no_grad()"
            )
        refuse_processes()
        layout = self._layout()
        if self._names is not None:
            self._names.check_current()
        self._stepping = True
        try:
            with torch.no_grad():
                yield self._make_attempt(layout)
        finally:
            self._stepping = False
            self._session = None

    def _make_attempt(self, layout: Layout) -> Attempt:
        assert self._pool is not None  # made by _layout()
        engine = choose_engine(self.engine, self.model, self._names, layout)
        if engine == "functional" and self.model is not None and self._names is not None:
            self._session = FunctionalSession(layout, self._pool, self.model, self._names.names)
        else:
            self._session = InplaceSession(layout, self._pool, self.model)
        return Attempt(
            self.base,
            self._session,
            Context(layout, self._pool, self.base),
            generators=[transform.generator for transform in self.transforms],
            others=[] if self._names is None else self._names.others,
            replay_rng=self.replay_rng,
            measure=self.nonfinite != "ignore",
        )

    def _verdict(
        self, gradients: Gradients, source: Evaluator | StoredGradients
    ) -> tuple[bool, Tensor | float | None]:
        """Whether all is finite, and the factor of the learning rate; one copy to the host."""
        scale = gradients.lr_scale if gradients.scales_lr else None
        float_lr = scale is not None and any(
            not isinstance(group.get("lr"), Tensor) for group in self.base.param_groups
        )
        if self.nonfinite == "ignore":
            return True, float(scale) if scale is not None and float_lr else scale
        parts = [part for _, losses, squares in source.measured for part in (losses, squares)]
        if scale is not None:
            parts.append(scale[None].to(parts[0].dtype))
        values = torch.cat(parts).tolist()
        culprit = _culprit(source, values)
        if culprit is None and scale is not None and not math.isfinite(values[-1]):
            culprit = f"the learning rate's factor is {values[-1]}"
        if culprit is not None:
            if self.nonfinite == "raise":
                raise NonFiniteError(
                    f"{culprit}; nothing was changed. Look at that objective's data or lower the "
                    "learning rate, or pass nonfinite='skip' to gk.wrap() to pass over such steps"
                )
            return False, None
        return True, values[-1] if scale is not None and float_lr else scale

    def _record(
        self,
        context: Context,
        gradients: Gradients,
        source: Evaluator | StoredGradients,
        *,
        applied: bool,
    ) -> None:
        firsts = source.first_losses
        self.last_step = StepRecord(
            names=gradients.names,
            losses=torch.stack([firsts[name] for name in gradients.names]),
            gram=gradients.gram(),
            weights=gradients.weights,
            lr_scale=gradients.lr_scale,
            gate=context.gate,
            decay=context.decay,
            applied=applied,
        )

    def _layout(self) -> Layout:
        """The present layout; scratch of an older one is dropped, transforms' vectors move."""
        layout = Layout.of(self.base.param_groups)
        if self._pool is None or not self._pool.layout.same_as(layout):
            self._pool = Pool(layout)
            self._names = None if self.model is None else ParameterNames(self.model, layout)
        layout = self._pool.layout
        if self._vector_layout is None or not self._vector_layout.same_as(layout):
            self._make_vectors(layout)
        return layout

    def _make_vectors(self, layout: Layout) -> None:
        for transform in self.transforms:
            fresh = transform.initial_vectors(layout)
            for name, vector in transform.vectors.items():
                if self._vector_layout is not None:
                    fresh[name] = layout.carry_over(vector, self._vector_layout)
            transform.vectors.clear()
            transform.vectors.update(fresh)
        saved_state.unlink_vectors(self.base)
        self._vector_layout = layout
        for number, transform in enumerate(self.transforms):
            for name, vector in transform.vectors.items():
                key = f"{saved_state.PREFIX}{number}.{name}"
                for parameter, view in zip(layout.parameters, layout.views(vector), strict=True):
                    if self.base.state.get(parameter):
                        self.base.state[parameter][key] = view

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with the transforms' state inside it.

        It holds plain values and tensors only, so it can be loaded with `weights_only=True`.
        Teachers are modules and are saved as such, beside it.
        """
        for pre in list(self._optimizer_state_dict_pre_hooks.values()):
            pre(self)
        self.base.param_groups[0][saved_state.KEY] = saved_state.encode(self.transforms)
        state: dict[str, Any] = self.base.state_dict()
        for post in list(self._optimizer_state_dict_post_hooks.values()):
            changed = post(self, state)
            if changed is not None:
                state = changed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, or the state dict of a bare base optimizer.

        Raises:
            ValueError: If it belongs to other transforms or parameters; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for pre in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = pre(self, state_dict)
            if changed is not None:
                state_dict = changed
        theirs, text, own = saved_state.split(state_dict)
        if text is not None:
            saved_state.check(text, self.transforms)
        saved_state.check_vectors(self.base.param_groups, own, theirs["param_groups"])
        self.base.load_state_dict(theirs)
        if text is not None:
            saved_state.decode(text, self.transforms)
        self.base.param_groups[0][saved_state.KEY] = saved_state.encode(self.transforms)
        self._pool = None
        self._vector_layout = None
        for transform in self.transforms:
            transform.vectors.clear()
        layout = self._layout()
        saved_state.load_vectors(
            self.transforms, layout, self.base.param_groups, own, theirs["param_groups"]
        )
        for post in list(self._optimizer_load_state_dict_post_hooks.values()):
            post(self)


def _culprit(source: Evaluator | StoredGradients, values: Sequence[float]) -> str | None:
    """What is not finite first, in words; None if everything is finite."""
    position = 0
    for number, (names, _, _) in enumerate(source.measured):
        losses = values[position : position + len(names)]
        squares = values[position + len(names) : position + 2 * len(names)]
        position += 2 * len(names)
        where = "" if number == 0 else f" (evaluation {number + 1} of the step)"
        bad = [
            f"the loss of objective {name!r} is {loss}{where}"
            for name, loss in zip(names, losses, strict=True)
            if not math.isfinite(loss) and name not in source.without_loss
        ] + [
            f"the gradient of objective {name!r} is not finite{where}"
            for name, square in zip(names, squares, strict=True)
            if not math.isfinite(square)
        ]
        if bad:
            return ", ".join(bad)
    return None
