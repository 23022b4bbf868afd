"""Models that adapt to each batch of test images before they predict."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkit.core.transform import Transform
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.record import StepRecord
from gradkit.optimizer.wrapping import wrap
from gradkit.tta.statistics import (
    Statistics,
    install_statistics,
    norm_affine_parameters,
    resolve_statistics,
)

Objective = Callable[[nn.Module, Tensor], Tensor]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


class Adapter:
    """Test-time adaptation as a product of independent choices.

    Called on a batch of images, an adapter takes one optimizer step on its objectives, then
    forwards the same images again with the updated weights and returns these logits. Everything
    happens on a copy: the model passed in is never changed. The copy is in evaluation mode;
    BatchNorm layers take mean and variance from `statistics`, and only `parameters` are trained.

    Args:
        model: The source model, from images [N, C, H, W] to logits.
        statistics: Where BatchNorm layers take mean and variance: "source" (running statistics),
            "test" (the current images), `Mixed(share)` or another `Statistics`.
        objectives: Functions `(model, images) -> loss` by name; without any, only the statistics
            adapt. Objectives with a state (a generator) are copied, so that adapters share nothing.
            An objective may have a method `check_images(images)`, which can raise before anything
            runs.
        transforms: gradkit's transforms between the objectives' gradients and the optimizer, or a
            function that makes them for the model's copy (needed for a teacher).
        optimizer: Makes the base optimizer from the list of trained parameters, for example
            `lambda parameters: torch.optim.Adam(parameters, lr=1e-4)`.
        episodic: Whether to reset before each batch: to the source model and the initial state of
            random number generators.
        parameters: Chooses the trained parameters of the model's copy; by default the scales and
            shifts of all normalisation layers.
        **options: Further arguments of `gradkit.wrap`, `nonfinite="skip"` for example.

    Attributes:
        model: The adapted copy.
        optimizer: The wrapped optimizer; None without objectives.

    Raises:
        RuntimeError: If there are objectives, but `torch.inference_mode()` is on.
        TypeError: If objectives are not a mapping.
        ValueError: If there are objectives but no optimizer or nothing to train, if there is an
            optimizer or a transform but no objective, if parameters or a teacher's student are not
            the copy's, or if the statistics do not fit the model.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.Adapter(
        ...     model,
        ...     statistics=gk.tta.Mixed(0.8),
        ...     objectives={"loss": gk.tta.entropy},
        ...     transforms=(gk.SAM(rho=0.05),),
        ...     optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        ... )
        >>> adapter(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: str | Statistics = "source",
        objectives: Mapping[str, Objective] | None = None,
        transforms: Sequence[Transform] | Callable[[nn.Module], Sequence[Transform]] = (),
        optimizer: OptimizerFactory | None = None,
        episodic: bool = False,
        parameters: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None,
        **options: Any,
    ) -> None:
        if objectives:
            _refuse_inference_mode()
        # Statistics may have state of their own, which must not be shared between adapters.
        self.statistics = copy.deepcopy(resolve_statistics(statistics))
        with torch.no_grad():  # scripted modules copy their parameters as operations
            self.model = copy.deepcopy(model).eval()
        install_statistics(self.model, self.statistics)
        self.objectives = _own(objectives or {})
        self.episodic = episodic
        self.optimizer: GradientOptimizer | None = None
        self.model.requires_grad_(False)
        if self.objectives:
            trained = self._choose(parameters or _norm_affine)
            self.optimizer = self._make_optimizer(optimizer, trained, transforms, options)
        elif transforms or optimizer is not None:
            raise ValueError(
                "there are no objectives for the optimizer and the transforms to work on; pass "
                "objectives={name: function of (model, images)}"
            )
        self._start = self.state_dict()

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
        return wrap(optimizer(trained), *chain, model=self.model, **options)

    def __call__(self, images: Tensor) -> Tensor:
        """Adapt to a batch of images, then predict: logits, detached.

        Images may be of a tensor subclass (MONAI's MetaTensor); the model gets plain tensors.

        If an objective raises, the adapter does not change.

        Raises:
            RuntimeError: If there are objectives, but `torch.inference_mode()` is on.
            ValueError: If an objective cannot work with these images.
        """
        images = _plain(images)
        if self.optimizer is not None:
            _refuse_inference_mode()
            if images.is_inference():  # made under inference mode: autograd cannot save them
                images = images.clone()
            for objective in self.objectives.values():
                check = getattr(objective, "check_images", None)
                if check is not None:
                    check(images)
            self._adapt(images, self.optimizer)
        elif self.episodic:
            self.reset()
        with torch.no_grad():
            logits: Tensor = self.model(images)
        return _plain(logits)

    def _adapt(self, images: Tensor, optimizer: GradientOptimizer) -> None:
        # The optimizer undoes its own step; everything else is restored here.
        before = self.state_dict() if self.episodic else self._beside_optimizer()
        last = optimizer.last_step
        try:
            if self.episodic:
                self.reset()
            start = optimizer.last_step
            optimizer.step(
                {
                    name: functools.partial(objective, self.model, images)
                    for name, objective in self.objectives.items()
                }
            )
        except BaseException:
            # A delayed interrupt comes after a step that was applied.
            if optimizer.last_step is start:
                self._load(before)
                optimizer.last_step = last
            raise

    @property
    def last_step(self) -> StepRecord | None:
        """The record of the last adaptation step; None if there was none."""
        return None if self.optimizer is None else self.optimizer.last_step

    def reset(self) -> None:
        """Restore the initial state exactly: weights, optimizer, objectives, statistics."""
        self.statistics.reset()
        self._load(self._start)
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
        return copy.deepcopy(
            {
                "objectives": {
                    name: objective.state_dict() for name, objective in self._stateful().items()
                },
                "statistics": self.statistics.state_dict(),
            }
        )

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
        for name, objective in self._stateful().items():
            objective.load_state_dict(state["objectives"][name])
        self.statistics.load_state_dict(state["statistics"])

    def _changing(self) -> dict[str, Tensor]:
        trained = {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        return {**trained, **dict(self.model.named_buffers())}

    def _stateful(self) -> dict[str, Stateful]:
        found: dict[str, Any] = {**self.objectives}
        return {name: item for name, item in found.items() if isinstance(item, Stateful)}

    def _teachers(self) -> list[nn.Module]:
        chain = () if self.optimizer is None else self.optimizer.transforms
        found = [getattr(transform, "teacher", None) for transform in chain]
        return [teacher for teacher in found if isinstance(teacher, nn.Module)]

    def __repr__(self) -> str:
        parts = [f"statistics={self.statistics!r}", f"objectives={list(self.objectives)!r}"]
        if self.optimizer is not None:
            parts.append(f"transforms={list(self.optimizer.transforms)!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _own(objectives: Mapping[str, Objective]) -> dict[str, Objective]:
    """The objectives; those with a state are copied.

    Raises:
        TypeError: If they are not a mapping.
    """
    if not isinstance(objectives, Mapping):
        raise TypeError(
            f"objectives is a {type(objectives).__name__}; pass a mapping from names to functions "
            "of (model, images)"
        )
    return {
        name: copy.deepcopy(objective) if isinstance(objective, Stateful) else objective
        for name, objective in objectives.items()
    }


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


@runtime_checkable
class Stateful(Protocol):
    """An objective with a state, such as a random number generator."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
