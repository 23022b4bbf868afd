"""A model that adapts to each batch of test images before it predicts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkit.engines import EngineName
from gradkit.optimizer import GradientOptimizer, wrap
from gradkit.oracle import Transform
from gradkit.record import StepRecord
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

    Called on a batch of images, it takes one step of its optimizer on its objectives, then
    forwards the same images again with the updated weights and returns those logits. Everything
    happens on a copy: the model passed in is never changed. The copy is in evaluation mode;
    normalisation layers take mean and variance from `statistics`, and only `parameters` are
    trained.

    Args:
        model: The source model, from images [N, C, H, W] to logits.
        statistics: Where normalisation layers take mean and variance: "source" (running
            statistics), "test" (the current images), `Mixed(share)` or another `Statistics`.
        objectives: Functions `(model, images) -> loss` by name; none adapts the statistics only.
        transforms: gradkit's transforms between the objectives' gradients and the optimizer.
        optimizer: Makes the base optimizer from the list of trained parameters, for example
            `lambda parameters: torch.optim.Adam(parameters, lr=1e-4)`.
        episodic: Whether to start from the source model for each batch.
        parameters: Chooses the trained parameters of the model's copy; by default the scales and
            shifts of all normalisation layers.
        engine: See `gradkit.wrap`.

    Attributes:
        model: The adapted copy.
        optimizer: The wrapped optimizer; None without objectives.

    Raises:
        ValueError: If there are objectives but no optimizer or nothing to train, or the
            statistics do not fit the model.

    Example:
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
        transforms: Sequence[Transform] = (),
        optimizer: OptimizerFactory | None = None,
        episodic: bool = False,
        parameters: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None,
        engine: EngineName = "auto",
    ) -> None:
        # Statistics may have state of their own, which must not be shared between adapters.
        self.statistics = copy.deepcopy(resolve_statistics(statistics))
        self.model = install_statistics(copy.deepcopy(model).eval(), self.statistics)
        self.objectives = dict(objectives or {})
        self.episodic = episodic
        self.optimizer: GradientOptimizer | None = None
        self.model.requires_grad_(False)
        if self.objectives:
            self.optimizer = self._make_optimizer(optimizer, transforms, parameters, engine)
        elif transforms or optimizer is not None:
            raise ValueError(
                "there are no objectives for the optimizer and the transforms to work on; pass "
                "objectives={name: function of (model, images)}"
            )
        self._start = copy.deepcopy(self.state_dict())

    def _make_optimizer(
        self,
        optimizer: OptimizerFactory | None,
        transforms: Sequence[Transform],
        parameters: Callable[[nn.Module], Iterable[nn.Parameter]] | None,
        engine: EngineName,
    ) -> GradientOptimizer:
        if optimizer is None:
            raise ValueError(
                "there are objectives but no optimizer; pass "
                "optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4)"
            )
        if parameters is None:
            trained = list(norm_affine_parameters(self.model).values())
        else:
            trained = list(parameters(self.model))
        if not trained:
            raise ValueError(
                f"{type(self.model).__name__} has no normalisation layer with scale and shift to "
                "train; choose others with parameters=lambda model: model.parameters()"
            )
        for parameter in trained:
            parameter.requires_grad_(True)
        return wrap(optimizer(trained), *transforms, model=self.model, engine=engine)

    def __call__(self, images: Tensor) -> Tensor:
        """Adapt to a batch of images, then predict: logits, detached.

        If an objective raises, the adapter is left as it was.
        """
        if self.episodic:
            self.reset()
        if self.optimizer is not None:
            before = {name: objective.state_dict() for name, objective in self._stateful().items()}
            try:
                self.optimizer.step(
                    {
                        name: lambda objective=objective: objective(self.model, images)  # type: ignore[misc]  # binds now
                        for name, objective in self.objectives.items()
                    }
                )
            except BaseException:
                self._load_objectives(before)
                raise
        with torch.no_grad():
            logits: Tensor = self.model(images)
        return logits

    @property
    def last_step(self) -> StepRecord | None:
        """What happened in the last adaptation step; None if there was none."""
        return None if self.optimizer is None else self.optimizer.last_step

    def reset(self) -> None:
        """Go back to the source model, bit for bit: weights, optimizer, objectives, statistics."""
        self.statistics.reset()
        self.load_state_dict(self._start)
        if self.optimizer is not None:
            self.optimizer.last_step = None

    def state_dict(self) -> dict[str, Any]:
        """All that adaptation changes: trained parameters, buffers, and the states of the rest.

        It belongs to an adapter of the same source model, which it does not contain.
        """
        return {
            "model": {name: tensor.detach().clone() for name, tensor in self._changing().items()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "objectives": {
                name: objective.state_dict() for name, objective in self._stateful().items()
            },
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: If the state is of an adapter of other parameters, objectives or
                transforms.
        """
        changing = self._changing()
        saved = state_dict["model"]
        for name in sorted(changing.keys() | saved.keys()):
            here = tuple(changing[name].shape) if name in changing else None
            there = tuple(saved[name].shape) if name in saved else None
            if here != there:
                raise ValueError(
                    f"the state is of another adapter: {name!r} has shape {there} in it and "
                    f"{here} here"
                )
        if (self.optimizer is None) != (state_dict["optimizer"] is None):
            raise ValueError("the state is of an adapter with other objectives")
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state_dict["optimizer"]))
        with torch.no_grad():
            for name, tensor in changing.items():
                tensor.copy_(saved[name])
        self._load_objectives(state_dict["objectives"])
        self.statistics.load_state_dict(state_dict["statistics"])

    def _changing(self) -> dict[str, Tensor]:
        trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        return {**trained, **dict(self.model.named_buffers())}

    def _load_objectives(self, states: Mapping[str, Any]) -> None:
        for name, objective in self._stateful().items():
            objective.load_state_dict(states[name])

    def _stateful(self) -> dict[str, Stateful]:
        found: dict[str, Any] = {**self.objectives}
        return {name: item for name, item in found.items() if isinstance(item, Stateful)}

    def __repr__(self) -> str:
        parts = [f"statistics={self.statistics!r}", f"objectives={list(self.objectives)!r}"]
        if self.optimizer is not None:
            parts.append(f"transforms={list(self.optimizer.transforms)!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


@runtime_checkable
class Stateful(Protocol):
    """An objective that remembers something, a random number generator for example."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember that."""
