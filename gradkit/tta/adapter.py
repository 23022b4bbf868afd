"""Models that adapt to each batch of test images before they predict."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkit.core.arguments import check_count
from gradkit.core.random import RandomState
from gradkit.core.transform import Transform
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.record import StepRecord
from gradkit.optimizer.wrapping import wrap
from gradkit.teachers.copying import copied
from gradkit.tta.episodes import Episodes
from gradkit.tta.parts import Objective, Predictor, Restore, Stateful, own, tell
from gradkit.tta.statistics import (
    Statistics,
    install_statistics,
    norm_affine_parameters,
    resolve_statistics,
)

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
Episodic = bool | Literal["image"]


class Adapter:
    """Test-time adaptation as a product of independent choices.

    Called on a batch of images, an adapter takes one optimizer step on its objectives, then
    forwards the same images again with the updated weights and returns these logits. Everything
    happens on a copy: the model passed in is never changed. The copy is in evaluation mode;
    BatchNorm layers take mean and variance from `statistics`, and only `parameters` are trained.

    Objectives, predictors and restores are plain functions, or objects with further methods
    (`gradkit.tta.parts`): a state, a check of the images, access to the adapter and its teacher.
    Those with a state are copied, so that adapters share nothing.

    Args:
        model: The source model, from images [N, C, H, W] to logits.
        statistics: Where BatchNorm layers take mean and variance: "source" (running statistics),
            "test" (the current images), `Mixed(share)` or another `Statistics`. Those that learn do
            so once per batch, before the step.
        objectives: Functions `(model, images) -> loss` by name, or a function that makes them for
            the model's copy; without any, only the statistics adapt. An objective that returns None
            leaves nothing to step on: with `on_empty="skip"` no step is taken, and
            `last_step.applied` is False.
        transforms: gradkit's transforms between the objectives' gradients and the optimizer, or a
            function that makes them for the model's copy (needed for a teacher).
        optimizer: Makes the base optimizer from the list of trained parameters, for example
            `lambda parameters: torch.optim.Adam(parameters, lr=1e-4)`.
        episodic: Whether to reset before each batch: to the source model and the initial state of
            random number generators. With "image" each image of a batch is an episode of its own,
            as if it had been passed alone, and all of them are computed at once, which takes less
            time and the memory of all. The adapter itself then never changes, `last_step` is None,
            and `facts` has losses and factors of the learning rate by image. It takes elementwise
            optimizers (SGD, Adam, AdamW, ...), `LookAhead` and `CosineLR`, statistics and
            objectives without a state (`Consistency` included); others are an error.
        parameters: Chooses the trained parameters of the model's copy; by default the scales and
            shifts of all normalisation layers.
        predict: What is returned: "after" for the logits with the updated weights, "before" for
            those with the weights before the step, or a function `(model, images) -> logits` that
            is called after the step.
        steps: How many optimizer steps to take on each batch.
        restore: Called with the adapter after each applied step, to move weights back to the
            source's: `Pull`, `StochasticRestore`, `PeriodicRestart` or another function.
        **options: Further arguments of `gradkit.wrap`, `nonfinite="skip"` for example.

    Attributes:
        model: The adapted copy.
        optimizer: The wrapped optimizer; None without objectives.
        statistics: The adapter's own statistics.
        objectives: The adapter's own objectives, by name.

    Raises:
        RuntimeError: If there are objectives, but `torch.inference_mode()` is on.
        TypeError: If objectives are not a mapping, or `steps` is no integer.
        ValueError: If there are objectives but no optimizer or nothing to train, if there is an
            optimizer, a transform, a restore or several steps but no objective, if parameters or a
            teacher's student are not the copy's, if the model cannot be copied, if the optimizer's
            ε is 0 in the precision of the weights, if `episodic` is "image" and something cannot be
            computed for several images at once, or if an argument has no valid value or the
            statistics do not fit the model.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Adapter(
        ...     model,
        ...     statistics=gk.tta.Mixed(0.8),
        ...     objectives={"loss": gk.tta.entropy},
        ...     transforms=(gk.SAM(rho=0.05),),
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ...     steps=2,
        ...     restore=gk.tta.Pull(0.01),
        ... )
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: str | Statistics = "source",
        objectives: Mapping[str, Objective]
        | Callable[[nn.Module], Mapping[str, Objective]]
        | None = None,
        transforms: Sequence[Transform] | Callable[[nn.Module], Sequence[Transform]] = (),
        optimizer: OptimizerFactory | None = None,
        episodic: Episodic = False,
        parameters: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None,
        predict: Literal["after", "before"] | Predictor = "after",
        steps: int = 1,
        restore: Restore | None = None,
        **options: Any,
    ) -> None:
        if objectives:
            _refuse_inference_mode()
        check_count("steps", steps)
        if isinstance(predict, str) and predict not in ("after", "before"):
            raise ValueError(
                f'predict is {predict!r}; choose "after", "before" or a function of (model, images)'
            )
        if not isinstance(episodic, bool) and episodic != "image":
            raise ValueError(f'episodic is {episodic!r}; choose False, True or "image"')
        # Statistics may have state of their own, which must not be shared between adapters.
        self.statistics = copy.deepcopy(resolve_statistics(statistics))
        self.model = own_copy(model).eval()
        install_statistics(self.model, self.statistics)
        self.objectives = _own(objectives(self.model) if callable(objectives) else objectives or {})
        self.episodic, self.steps = episodic, steps
        self.predict, self.restore = own(predict), own(restore)
        self.optimizer: GradientOptimizer | None = None
        self._episodes: Episodes | None = None
        self.model.requires_grad_(False)
        if self.objectives:
            trained = self._choose(parameters or _norm_affine)
            self.optimizer = self._make_optimizer(optimizer, trained, transforms, options)
        elif transforms or optimizer is not None or restore is not None or steps > 1:
            raise ValueError(
                "there are no objectives for the optimizer and the transforms to work on; pass "
                "objectives={name: function of (model, images)}"
            )
        tell(self._parts(), "attach", self)
        self._start = self.state_dict()
        if episodic == "image":
            self._episodes = self._make_episodes(options)

    def _make_episodes(self, options: Mapping[str, Any]) -> Episodes:
        if self.optimizer is None:
            raise ValueError(
                'episodic is "image", but there are no objectives, so that nothing is learnt from '
                "an image that another could see; leave episodic out, and pass single images if "
                "statistics are of the batch"
            )
        return Episodes(
            self.model,
            self.objectives,
            self.optimizer.transforms,
            self.optimizer.base,
            self.statistics,
            steps=self.steps,
            predict=self.predict,
            restore=self.restore,
            start=self._start,
            options=options,
        )

    def _choose(
        self, parameters: Callable[[nn.Module], Iterable[nn.Parameter]]
    ) -> list[nn.Parameter]:
        chosen = list(dict.fromkeys(parameters(self.model)))
        if not chosen:
            raise ValueError(
                f"{type(self.model).__name__} has no normalisation layer with scale and shift to "
                "train; choose others with parameters=lambda model: model.parameters()"
            )
        own = set(self.model.parameters())
        for parameter in chosen:
            if parameter not in own:
                raise ValueError(
                    "parameters= chose a parameter that is not the adapted copy's (the source "
                    "model's, perhaps); choose from the model it is called with, as in "
                    "parameters=lambda model: model.parameters()"
                )
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def _make_optimizer(
        self,
        optimizer: OptimizerFactory | None,
        trained: list[nn.Parameter],
        transforms: Sequence[Transform] | Callable[[nn.Module], Sequence[Transform]],
        options: dict[str, Any],
    ) -> GradientOptimizer:
        if optimizer is None:
            raise ValueError(
                "there are objectives but no optimizer; pass "
                "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4)"
            )
        chain = tuple(transforms(self.model) if callable(transforms) else transforms)
        modules = set(self.model.modules())
        for transform in chain:
            student = getattr(transform, "student", None)
            if isinstance(student, nn.Module) and student not in modules:
                raise ValueError(
                    f"{transform!r} follows a module that is not adapted: adaptation works on a "
                    "copy; pass transforms=lambda model: (...), which is called with the copy"
                )
        # Each rank adapts its own copy to its own images.
        options = {"process_group": None, **options}
        base = optimizer(trained)
        _check_precision(base)
        return wrap(base, *chain, model=self.model, **options)

    def __call__(self, images: Tensor) -> Tensor:
        """Adapt to a batch of images, then predict: logits, detached.

        Images may be of a tensor subclass (MONAI's MetaTensor); the model gets plain tensors.

        If an objective raises, the adapter does not change, and torch's random numbers go on as if
        it had not been called. After a step that is skipped (`last_step.applied` is False), the
        generators of its parts have their state from before the step.

        Raises:
            RuntimeError: If there are objectives, but `torch.inference_mode()` is on; or if
                `episodic` is "image", and something cannot be computed for several images at once.
            TypeError: If images are not a tensor.
            ValueError: If there are no images, or an objective cannot work with them.
        """
        images = self._received(images)
        if self._episodes is not None:
            return _plain(self._episodes(images))
        logits = self._adapt(images)
        if logits is None:
            with torch.no_grad():
                if isinstance(self.predict, str):
                    logits = self.model(images)
                else:
                    logits = self.predict(self.model, images)
        return _plain(logits)

    def adapt(self, images: Tensor) -> None:
        """Adapt to a batch without predicting it, and without what a prediction remembers.

        For methods that see all of the target before they predict it. Then `adapter.model(images)`
        predicts without adapting.

        Raises:
            RuntimeError: As in a call.
            TypeError: As in a call.
            ValueError: As in a call, or if `episodic` is "image", which keeps nothing of a batch.
        """
        if self._episodes is not None:
            raise ValueError(
                'episodic is "image", with which the adapter never changes, so that nothing would '
                "be learnt for a later prediction; call the adapter itself"
            )
        self._adapt(self._received(images))

    def _received(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images is a {type(images).__name__}; pass a tensor [N, C, H, W] of images alone, "
                "without their labels"
            )
        if not images.numel():
            raise ValueError(
                f"images have the shape {list(images.shape)}: there are none to adapt to"
            )
        images = _plain(images)
        if self.optimizer is not None:
            _refuse_inference_mode()
            if images.is_inference():  # made under inference mode: autograd cannot save them
                images = images.clone()
        tell(self._parts(), "check_images", images)
        return images

    def _adapt(self, images: Tensor) -> Tensor | None:
        """Adapt to the images.

        Returns:
            The logits before the step, if these are the prediction.
        """
        # The optimizer undoes a step of its own; the rest is restored here.
        # A teacher's statistics may learn when it is asked.
        whole = self.episodic or self.steps > 1 or self._observes
        whole = whole or self.restore is not None or self.teacher is not None
        saved = self.state_dict() if whole else self._beside_optimizer()
        random = RandomState.capture(images.device)
        last = start = self.last_step
        logits: Tensor | None = None
        self._clear_facts()
        try:
            if self.episodic:
                self.reset()
                start = self.last_step
            with torch.no_grad():
                if self._observes:
                    self.statistics.observe(self.model, images)
                tell(self._parts(), "begin_batch", images)
                if self.predict == "before":
                    logits = self.model(images)
            if self.optimizer is not None:
                for _ in range(self.steps):
                    self._step(images, self.optimizer)
        except BaseException:
            # A delayed interrupt comes after a step that was applied.
            if whole or self.last_step is start:
                self._load(saved)
                random.restore()
                if self.optimizer is not None:
                    self.optimizer.last_step = last
            raise
        return logits

    def _step(self, images: Tensor, optimizer: GradientOptimizer) -> None:
        states = [(generator, generator.get_state()) for generator in self._generators()]
        tell(self._parts(), "begin_step", images)
        optimizer.step(
            {
                name: functools.partial(objective, self.model, images)
                for name, objective in self.objectives.items()
            }
        )
        record = optimizer.last_step
        if record is None or not record.applied:
            for generator, state in states:
                generator.set_state(state)
        elif self.restore is not None:
            self.restore(self)

    def _generators(self) -> list[torch.Generator]:
        """Of the parts; those of transforms the optimizer puts back itself."""
        found = [getattr(part, "generator", None) for part in self._parts()]
        return [each for each in found if isinstance(each, torch.Generator)]

    @property
    def _observes(self) -> bool:
        return type(self.statistics).observe is not Statistics.observe

    def _parts(self) -> list[object]:
        """Everything that may have a part's further methods."""
        chain = () if self.optimizer is None else self.optimizer.transforms
        return [*self.objectives.values(), *chain, self.predict, self.restore, self._episodes]

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher of the first transform that has one; None if none has."""
        return next(iter(self._teachers()), None)

    @property
    def facts(self) -> dict[str, Any]:
        """What the parts tell of the last batch, by name: a distance, weights of a mixture, a gate.

        `last_step` is the record of the optimizer's step.
        """
        found: dict[str, Any] = {}
        for part in (self.statistics, *self._parts()):
            found.update(getattr(part, "facts", {}))
        return found

    def _clear_facts(self) -> None:
        """Forget what was told of earlier batches: not every part acts in each."""
        for part in (self.statistics, *self._parts()):
            if isinstance(getattr(part, "__dict__", {}).get("facts"), dict):
                setattr(part, "facts", {})  # noqa: B010 # not all parts have it

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def source_weights(self) -> dict[str, Tensor]:
        """The values that the trained parameters had at the start; only to be read."""
        return {name: self._start["model"][name] for name in self.trained()}

    def restart(self) -> None:
        """Restore weights, buffers, optimizer and teachers; parts and statistics keep their state.

        For restores; `reset` restores everything.
        """
        record = self.last_step
        self._load({key: self._start[key] for key in ("model", "optimizer", "teachers")})
        if self.optimizer is not None:
            self.optimizer.last_step = record

    @property
    def last_step(self) -> StepRecord | None:
        """The record of the last adaptation step; None if there was none."""
        return None if self.optimizer is None else self.optimizer.last_step

    def reset(self) -> None:
        """Restore the initial state exactly: weights, optimizer, objectives, statistics."""
        self.statistics.reset()
        self._load(self._start)
        self._clear_facts()
        if self.optimizer is not None:
            self.optimizer.last_step = None

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that adaptation changes.

        These are the trained parameters, the buffers, and the state of the optimizer, teachers,
        objectives and statistics. The other weights of the source model are not included.
        """
        state = {
            "model": dict(self._changing()),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "teachers": [teacher.state_dict() for teacher in self._teachers()],
            **self._beside_optimizer(),
        }
        return copy.deepcopy(state)

    def _beside_optimizer(self) -> dict[str, Any]:
        objectives: dict[str, Any] = dict(self.objectives)
        beside: dict[str, Any] = {
            "objectives": {
                name: objective.state_dict()
                for name, objective in objectives.items()
                if isinstance(objective, Stateful)
            },
            "statistics": self.statistics.state_dict(),
        }
        for name in ("predict", "restore"):
            part = getattr(self, name)
            if isinstance(part, Stateful):
                beside[name] = part.state_dict()
        return copy.deepcopy(beside)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If the state is of an adapter of other parameters, objectives, statistics
                or transforms.
        """
        start = self._start
        if state_dict.keys() != start.keys():
            raise ValueError(
                f"the state has the entries {', '.join(map(repr, state_dict)) or 'none'}; an "
                f"adapter's has {', '.join(map(repr, start))}"
            )
        for part in ("model", "objectives", "statistics"):
            here, there = _outline(start[part]), _outline(state_dict[part])
            if here != there:
                name = sorted(
                    key for key in here.keys() | there.keys() if here.get(key) != there.get(key)
                )[0]
                raise ValueError(
                    f"the state is of another adapter: in {part!r}, {name!r} is "
                    f"{there.get(name, 'absent')} in it and {here.get(name, 'absent')} here"
                )
        if len(start["teachers"]) != len(state_dict["teachers"]):
            raise ValueError("the state is of an adapter with other teachers")
        if (self.optimizer is None) != (state_dict["optimizer"] is None):
            raise ValueError("the state is of an adapter with other objectives")
        self._load(state_dict)

    def _load(self, state: Mapping[str, Any]) -> None:
        """Load the parts that are in `state`."""
        state = copy.deepcopy(dict(state))
        for teacher, values in zip(self._teachers(), state.get("teachers", ()), strict=False):
            teacher.load_state_dict(values)
        if self.optimizer is not None and "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            changing = self._changing()
            for name, tensor in state.get("model", {}).items():
                changing[name].copy_(tensor)
        for name, values in state.get("objectives", {}).items():
            _load_part(self.objectives[name], values)
        for name in ("predict", "restore"):
            if name in state:
                _load_part(getattr(self, name), state[name])
        if "statistics" in state:
            self.statistics.load_state_dict(state["statistics"])

    def _changing(self) -> dict[str, Tensor]:
        trained = {name: parameter.detach() for name, parameter in self.trained().items()}
        return {**trained, **dict(self.model.named_buffers())}

    def _teachers(self) -> list[nn.Module]:
        chain = () if self.optimizer is None else self.optimizer.transforms
        found = [getattr(transform, "teacher", None) for transform in chain]
        return [teacher for teacher in found if isinstance(teacher, nn.Module)]

    def __repr__(self) -> str:
        parts = [f"statistics={self.statistics!r}", f"objectives={list(self.objectives)!r}"]
        if self.optimizer is not None:
            parts.append(f"transforms={list(self.optimizer.transforms)!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, also where hooks keep computed weights on its layers.

    Raises:
        ValueError: If it cannot be copied.
    """
    try:
        with torch.no_grad():  # scripted modules copy their parameters as operations
            return copied(model)
    except ValueError as error:
        raise ValueError(
            f"the model, a {type(model).__name__}, cannot be copied ({error.__cause__}), and "
            "adaptation works on a copy; remove from it what copy.deepcopy cannot copy, such as "
            "an open file or a result that an attribute keeps"
        ) from error.__cause__


def _check_precision(base: Optimizer) -> None:
    """Check that the optimizer's ε is not 0 in the precision of what it trains.

    Raises:
        ValueError: If it is: a gradient of 0 would make NaN of a weight.
    """
    for group in base.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or eps <= 0:
            continue
        for dtype in {parameter.dtype for parameter in group["params"]}:
            if torch.tensor(eps, dtype=dtype, device="cpu") == 0:
                raise ValueError(
                    f"{type(base).__name__} divides by a root plus eps={eps}, which is 0 in "
                    f"{dtype}, so that a gradient of 0 would make a weight NaN: keep the "
                    "model in float32 and adapt under torch.autocast, or pass an optimizer with a "
                    "larger eps, such as 1e-4"
                )


def _own(objectives: Mapping[str, Objective]) -> dict[str, Objective]:
    """The objectives; those that keep something are copied.

    Raises:
        TypeError: If they are not a mapping.
    """
    if not isinstance(objectives, Mapping):
        raise TypeError(
            f"objectives is a {type(objectives).__name__}; pass a mapping from names to functions "
            "of (model, images)"
        )
    return {name: own(objective) for name, objective in objectives.items()}


def _load_part(part: object, state: Mapping[str, Any]) -> None:
    assert isinstance(part, Stateful)
    part.load_state_dict(state)


def _plain(value: Tensor) -> Tensor:
    """The tensor without its subclass; subclasses that wrap other tensors are kept."""
    kind = type(value)
    if kind is Tensor or not isinstance(value, Tensor) or hasattr(kind, "__tensor_flatten__"):
        return value
    return value.as_subclass(Tensor)


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adapting takes gradients, which torch.inference_mode() rules out. Lightning tests, "
            "validates and predicts under it: pass lightning.Trainer(inference_mode=False). "
            "Elsewhere use torch.no_grad() in its place, or none"
        )


def _norm_affine(model: nn.Module) -> list[nn.Parameter]:
    return list(norm_affine_parameters(model).values())


def _outline(part: Mapping[str, Any]) -> dict[str, str]:
    """A description of each entry of a state."""
    return {
        name: f"of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
        for name, value in part.items()
    }
