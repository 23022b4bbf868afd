"""Episodes of several images at once, each with weights and an optimizer state of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from gradkit.alignment import CosineLR, LookAhead
from gradkit.core.gram import accumulator, cosines
from gradkit.core.transform import Transform
from gradkit.optimizer.finite_check import NonFiniteError
from gradkit.tta.parts import Objective, Stateful
from gradkit.tta.statistics import Statistics
from gradkit.tta.vectorised import in_autocast, vectorised

BASES = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
)
"""Optimizers that step elementwise, proportionally to the learning rate."""

_ONE_BY_ONE = "use episodic=True, and call the adapter with one image at a time"

Rows = list[Tensor | None]
"""A gradient of each stacked parameter, [images, *shape]; None where none reached it."""


@runtime_checkable
class Drawing(Stateful, Protocol):
    """An objective whose random numbers can be drawn before it meets the model.

    `objective(model, images)` must be `objective.given(model, images, objective.draw(images))`, and
    its state that of its generator.
    """

    def draw(self, image: Tensor) -> Tensor:
        """What depends on the images and on random numbers."""

    def given(self, model: nn.Module, image: Tensor, drawn: Tensor) -> Tensor:
        """The loss, without random numbers."""


@dataclass
class _Weights:
    """The trained parameters of all episodes, stacked: [images, *shape] by name."""

    parameters: dict[str, nn.Parameter]
    base: Optimizer


class Episodes:
    """What `Adapter(episodic="image")` does with a batch: each image's own episode, all at once.

    The trained parameters of B images are tensors [B, *shape]; all other weights are shared. Losses
    of all images come from one vectorised evaluation (`torch.vmap`), so that each image has its own
    statistics, and the gradient of their sum holds each image's gradient. The base optimizer steps
    on the stacked parameters, elementwise.

    Args:
        model: The adapted copy, which is not changed.
        objectives: By name.
        chain: The transforms: none, `LookAhead`, `CosineLR`, or the first and then the second.
        base: The base optimizer of the copy's parameters, in its initial state.
        statistics: The copy's.
        steps: Optimizer steps of each episode.
        predict: "after" or "before" the steps.
        restore: None.
        start: The adapter's initial state.
        options: The arguments for `gradkit.wrap`.

    Attributes:
        facts: Of the last step of the last batch: "losses" by objective, "cosine" and "lr_scale",
            each [B].

    Raises:
        ValueError: If one of these cannot be served exactly.

    Examples:
        >>> import gradkit as gk
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.TENT(model, lr=1e-2, episodic="image")
        >>> adapter(torch.rand(4, 3, 8, 8)).shape, adapter.facts["losses"]["loss"].shape
        (torch.Size([4, 2, 8, 8]), torch.Size([4]))
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Mapping[str, Objective],
        chain: Sequence[Transform],
        base: Optimizer,
        statistics: Statistics,
        *,
        steps: int,
        predict: object,
        restore: object,
        start: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        _check_objectives(objectives)
        _check_chain(chain)
        _check_rest(base, statistics, predict, restore, options)
        self.objectives = dict(objectives)
        self.look_ahead = next((each for each in chain if isinstance(each, LookAhead)), None)
        self.cosine_lr = next((each for each in chain if isinstance(each, CosineLR)), None)
        self.steps, self.predict = steps, predict
        self.checks = options.get("nonfinite", "raise") == "raise"
        self._start = start
        self._call = _Call(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # The optimizer's groups and settings, with its parameters' names in their places.
        self._base = copy.deepcopy(base, {id(p): name for name, p in trained.items()})
        self.facts: dict[str, Any] = {}
        self._check_names(chain)

    def _check_names(self, chain: Sequence[Transform]) -> None:
        ahead, cosine = self.look_ahead, self.cosine_lr
        wanted = [] if ahead is None else [ahead.along, ahead.update]
        wanted += [] if cosine is None else [cosine.a, cosine.b]
        for name in wanted:
            if name not in self.objectives:
                raise ValueError(
                    f"the transforms {', '.join(map(repr, chain))} need an objective {name!r}, but "
                    f"there are {', '.join(map(repr, self.objectives))}"
                )

    def __call__(self, images: Tensor) -> Tensor:
        """The logits of all images, each adapted to by itself.

        Raises:
            NonFiniteError: If a loss, a gradient or a factor of the learning rate is not finite.
            RuntimeError: If something cannot be evaluated for several images at once.
        """
        if in_autocast(images.device):
            raise RuntimeError(
                "torch.autocast does not reach the vectorised passes of several images; adapt "
                f"outside of it, or {_ONE_BY_ONE}"
            )
        weights = self._fresh(len(images))
        before = self._logits(weights, images) if self.predict == "before" else None
        with self._objectives_at_start():
            for _ in range(self.steps):
                self._step(weights, images)
        return self._logits(weights, images) if before is None else before

    def _fresh(self, count: int) -> _Weights:
        """The source's weights for each image, and an optimizer of them."""
        parameters = {
            name: nn.Parameter(value.expand(count, *value.shape).clone())
            for name, value in self._initial(self._call.model.named_parameters()).items()
        }
        base = copy.deepcopy(self._base)
        for group in base.param_groups:
            group["params"] = [parameters[name] for name in group["params"]]
        return _Weights(parameters, base)

    def _initial(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The initial values of those that adaptation changes, where the model is now."""
        start = self._start["model"]
        return {name: start[name].to(tensor) for name, tensor in tensors if name in start}

    @contextmanager
    def _objectives_at_start(self) -> Iterator[None]:
        """A context in which generators start as at each reset; afterwards they are as before."""
        drawing: dict[str, Any] = {
            name: each for name, each in self.objectives.items() if isinstance(each, Drawing)
        }
        saved = {name: copy.deepcopy(each.state_dict()) for name, each in drawing.items()}
        try:
            for name, each in drawing.items():
                each.load_state_dict(copy.deepcopy(self._start["objectives"][name]))
            yield
        finally:
            for name, each in drawing.items():
                each.load_state_dict(saved[name])

    def _step(self, weights: _Weights, images: Tensor) -> None:
        parameters = list(weights.parameters.values())
        losses: dict[str, Tensor] = {}
        rows: dict[str, Rows] = {}
        ahead = self.look_ahead
        for name in self._order():
            point: Mapping[str, Tensor] = weights.parameters
            if ahead is not None and name == ahead.update:
                point = _displaced(point, rows[ahead.along], -ahead.step_size)
            losses[name], rows[name] = self._gradient(name, point, images)
        observed = () if ahead is None else (ahead.along,)
        direction = [
            _sum([row[t] for name, row in rows.items() if name not in observed])
            for t in range(len(parameters))
        ]
        scale: Tensor | None = None
        facts: dict[str, Any] = {"losses": losses}
        if self.cosine_lr is not None:
            cosine = _cosine(rows[self.cosine_lr.a], rows[self.cosine_lr.b])
            factors = [self.cosine_lr.factor(each) for each in cosine]
            scale = torch.stack([torch.ones_like(cosine[0]) * factor for factor in factors])
            facts |= {"cosine": cosine, "lr_scale": scale}
        if self.checks:
            _check_finite(losses, rows, scale)
        _apply(weights.base, parameters, direction, scale)
        self.facts = facts

    def _order(self) -> list[str]:
        """The objectives; one that is evaluated after a step along another comes last."""
        ahead = None if self.look_ahead is None else self.look_ahead.update
        return sorted(self.objectives, key=lambda name: name == ahead)

    def _gradient(
        self, name: str, point: Mapping[str, Tensor], images: Tensor
    ) -> tuple[Float[Tensor, " images"], Rows]:
        """Each image's loss and gradient at its own weights.

        Raises:
            RuntimeError: If it cannot be evaluated for several images at once, or if no trained
                parameter has a gradient.
        """
        objective = self.objectives[name]
        each = images.unsqueeze(1)
        leaves = {key: value.detach().requires_grad_() for key, value in point.items()}
        function: Callable[..., Any] = objective
        inputs: tuple[Any, ...] = (leaves, each)
        if isinstance(objective, Drawing):
            function, inputs = objective.given, (*inputs, _drawn_alike(objective, each))

        def loss(values: dict[str, Tensor], *arguments: Tensor) -> Tensor:
            found = self._evaluated(values, function, *arguments)
            if not isinstance(found, Tensor) or found.dim() != 0:
                got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
                raise ValueError(
                    f"the objective {name!r} returned {got} for one image; several images at once "
                    f"need one number for each. To leave images out, {_ONE_BY_ONE}"
                )
            return found

        with torch.enable_grad():
            losses = _explained(loss, f"the objective {name!r}", *inputs)
            found: Rows = [None]
            if losses.requires_grad:
                leaf = list(leaves.values())
                found = list(torch.autograd.grad(losses.sum(), leaf, allow_unused=True))
        if all(row is None for row in found):
            raise RuntimeError(
                f"the objective {name!r} has no gradient with respect to the trained parameters; "
                "return a loss that depends on the model's output"
            )
        return losses.detach(), found

    @torch.no_grad()
    def _logits(self, weights: _Weights, images: Tensor) -> Tensor:
        def predict(values: dict[str, Tensor], image: Tensor) -> Tensor:
            logits = self._evaluated(values, nn.Module.__call__, image)
            if not isinstance(logits, Tensor):
                raise ValueError(
                    f"the model returned a {type(logits).__name__}; several images at once need a "
                    "tensor: wrap it in a module that returns its logits only"
                )
            return logits

        values = {name: value.detach() for name, value in weights.parameters.items()}
        logits: Tensor = _explained(predict, "the model", values, images.unsqueeze(1))
        return logits.flatten(0, 1)

    def _evaluated(
        self, values: Mapping[str, Tensor], function: Callable[..., Any], *arguments: Tensor
    ) -> Any:
        """`function(model, *arguments)`, with other trained parameters and the initial buffers.

        Raises:
            RuntimeError: If a buffer is written.
        """
        initial = self._initial(self._call.model.named_buffers())
        buffers = {name: value.clone() for name, value in initial.items()}
        tensors = {f"model.{name}": tensor for name, tensor in {**buffers, **values}.items()}
        result = functional_call(self._call, tensors, (function, *arguments))
        for name, buffer in buffers.items():
            if buffer._version:
                raise RuntimeError(f"the model writes its buffer {name!r}, which is one for all")
        return result


class _Call(nn.Module):
    """Calls a function with the model, so that its weights can be replaced for all of the call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        return function(self.model, *arguments)


def _explained(function: Callable[..., Any], what: str, *inputs: Any) -> Tensor:
    """The vectorised function's results.

    Raises:
        RuntimeError: If it cannot be vectorised.
    """
    try:
        results: Tensor = vectorised(function, *inputs)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"{what} cannot be evaluated for several images at once ({reason}); {_ONE_BY_ONE}"
        ) from error
    return results


def _drawn_alike(objective: Drawing, each: Tensor) -> Tensor:
    """What is drawn for each image [1, ...], from the same state of the generator."""
    state = copy.deepcopy(objective.state_dict())
    drawn = []
    for image in each:
        objective.load_state_dict(copy.deepcopy(state))
        drawn.append(objective.draw(image))
    return torch.stack(drawn)


def _displaced(point: Mapping[str, Tensor], by: Rows, factor: float) -> dict[str, Tensor]:
    """The weights, displaced by a multiple of rows."""
    return {
        name: value.detach() if row is None else value.detach().add(row, alpha=factor)
        for (name, value), row in zip(point.items(), by, strict=True)
    }


def _sum(rows: Sequence[Tensor | None]) -> Tensor | None:
    there = [row for row in rows if row is not None]
    return torch.stack(there).sum(dim=0) if there else None


def _cosine(a: Rows, b: Rows) -> Float[Tensor, " images"]:
    """The cosine of two gradients of each image, over all parameters."""
    return cosines(_gram([a, b]))[:, 0, 1]


def _gram(rows: Sequence[Rows]) -> Float[Tensor, "images K K"]:
    """The Gram matrix of each image's gradients."""
    total: Any = 0
    for parts in zip(*rows, strict=True):
        there = next((part for part in parts if part is not None), None)
        if there is None:
            continue
        wide = accumulator(there.device)
        stacked = torch.stack(
            [torch.zeros_like(there) if part is None else part for part in parts], dim=1
        )
        columns = stacked.flatten(2).to(wide)
        total = total + columns @ columns.mT
    assert isinstance(total, Tensor)
    return total


def _check_finite(
    losses: Mapping[str, Tensor], rows: Mapping[str, Rows], scale: Tensor | None
) -> None:
    """Check that all is finite, by one copy to the host.

    Raises:
        NonFiniteError: If something is not.
    """
    found = {f"the loss of objective {name!r} is": loss for name, loss in losses.items()}
    for name, row in rows.items():
        found[f"the squared norm of the gradient of objective {name!r} is"] = _gram([row])[:, 0, 0]
    if scale is not None:
        found["the learning rate's factor is"] = scale
    wide = accumulator(next(iter(losses.values())).device)
    values = torch.stack([value.to(wide) for value in found.values()])
    bad = (~torch.isfinite(values)).nonzero().tolist()
    if bad:
        row, image = bad[0]
        raise NonFiniteError(
            f"{list(found)[row]} {float(values[row, image])} for image {image} of the batch; "
            "nothing was changed. Look at this image, lower the learning rate, or leave it out"
        )


@torch.no_grad()
def _apply(
    base: Optimizer,
    parameters: Sequence[nn.Parameter],
    direction: Sequence[Tensor | None],
    scale: Float[Tensor, " images"] | None,
) -> None:
    """A step of the base optimizer, whose learning rate is scaled for each image."""
    before = None if scale is None else [parameter.clone() for parameter in parameters]
    for parameter, grad in zip(parameters, direction, strict=True):
        parameter.grad = grad
    base.step()
    base.zero_grad(set_to_none=True)
    if before is None or scale is None:
        return
    for parameter, old in zip(parameters, before, strict=True):
        # These optimizers' steps are proportional to the learning rate.
        factor = scale.to(old).view(-1, *[1] * (old.dim() - 1))
        parameter.copy_(old + factor * (parameter - old))


def _check_objectives(objectives: Mapping[str, Objective]) -> None:
    for name, objective in objectives.items():
        hooks = [
            hook for hook in ("attach", "begin_batch", "begin_step") if hasattr(objective, hook)
        ]
        if hooks:
            raise ValueError(
                f"the objective {name!r} has {hooks[0]}(), which is for one batch and not for "
                f"several episodes at once; {_ONE_BY_ONE}"
            )
        if isinstance(objective, Stateful) and not isinstance(objective, Drawing):
            raise ValueError(
                f"the objective {name!r} keeps a state, of which each image would need its own; "
                f"{_ONE_BY_ONE}. If the state is of a random number generator only, give it "
                "draw(images) and given(model, images, drawn), as gk.tta.Consistency has"
            )
        if isinstance(objective, Drawing) and _calls_anew(type(objective)):
            raise ValueError(
                f"the objective {name!r} is a {type(objective).__name__}, which has a __call__ of "
                "its own, but inherits draw and given, by which several images at once are "
                "evaluated: write given(model, images, drawn) instead of __call__"
            )


def _calls_anew(kind: type) -> bool:
    """Whether a class overrides `__call__`, but neither `draw` nor `given`."""

    def depth(method: str) -> int:
        return next(k for k, each in enumerate(kind.__mro__) if method in vars(each))

    return depth("__call__") < min(depth("draw"), depth("given"))


def _check_chain(chain: Sequence[Transform]) -> None:
    kinds = [type(transform) for transform in chain]
    if kinds not in ([], [LookAhead], [CosineLR], [LookAhead, CosineLR]):
        raise ValueError(
            f"the transforms are {', '.join(map(repr, chain))}; several episodes at once take "
            f"none, LookAhead, CosineLR, or both in this order: leave others out, or {_ONE_BY_ONE}"
        )


def _check_rest(
    base: Optimizer,
    statistics: Statistics,
    predict: object,
    restore: object,
    options: Mapping[str, Any],
) -> None:
    if type(base) not in BASES:
        raise ValueError(
            f"the optimizer is {type(base).__name__}; several episodes at once take "
            f"{', '.join(kind.__name__ for kind in BASES)}, which step elementwise: choose one of "
            f"these, or {_ONE_BY_ONE}"
        )
    if statistics.learns:
        raise ValueError(
            f"{statistics!r} learn from batches, and each image would need its own: choose "
            f'statistics without a state, such as "test" or gk.tta.Mixed(0.8), or {_ONE_BY_ONE}'
        )
    if not isinstance(predict, str):
        raise ValueError(
            f'predict is {predict!r}; several episodes at once take "after" or "before": choose '
            f"one of these, or {_ONE_BY_ONE}"
        )
    served: dict[str, tuple[object, ...]] = {
        "process_group": (None,),
        "nonfinite": ("raise", "ignore"),
        "restore": (None,),
    }
    for name, value in {**options, "restore": restore}.items():
        if name != "engine" and value not in served.get(name, ()):
            raise ValueError(
                f"{name} is {value!r}, which several episodes at once do not take: leave it out, "
                f"or {_ONE_BY_ONE}"
            )
