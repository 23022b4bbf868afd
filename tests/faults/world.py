"""A case come to life: the model, its optimizer, and objectives that can be struck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradkit as gk
from faults.case import BASES, CHAINS, NETWORKS, ONE, Case, Moment
from gradkit.engines.objectives import Objectives


class Network(nn.Module):
    """A small network; with `extras` it also has parameters and buffers of unusual kinds."""

    def __init__(self, name: str, extras: bool) -> None:
        super().__init__()
        self.body = NETWORKS[name]()
        self.head = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.extras = extras
        if extras:
            self.unused = nn.Parameter(torch.ones(2))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.outside = nn.Parameter(torch.ones(2))
            self.register_buffer("last", None)
            self.register_buffer("shared", self.count)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        scores: Tensor = self.head(self.body(x))
        if self.extras:
            self.last = scores.detach().mean(0)
            scores = scores * self.frozen * self.outside
        return scores


INPUT = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 4, 3).sin()
TARGET = torch.linspace(2, -1, 16, dtype=torch.float64).reshape(2, 4, 2).cos()


class World:
    """One case come to life, after its good steps."""

    def __init__(self, case: Case, extra: Callable[[], gk.Transform] | None = None) -> None:
        self.case, self.shape = case, case.shape
        torch.default_generator.manual_seed(0)
        self.model = Network(case.network, case.extras).to(case.dtype)
        if case.extras:
            self.model._buffers["shared"] = self.model.count
        self.outside = [self.model.outside] if case.extras else []
        self.base = BASES[case.base](self.groups(), lr=self.rate(0.05))
        chain = CHAINS[case.shape.chain](self.model)
        self.extra = extra() if extra is not None else None
        if self.extra is not None:
            chain = (self.extra, *chain) if case.choice % 2 else (*chain, self.extra)
        self.optimizer = gk.wrap(
            self.base,
            *chain,
            model=self.model,
            engine=case.engine,
            nonfinite=case.nonfinite,
            max_norm=case.max_norm,
            replay_rng=case.replay_rng,
        )
        self.error: BaseException | None = None  # the very object that must come out
        self.strike: Strike | None = None
        self.saved: Any = None
        self.spare: torch.optim.Optimizer | None = None  # another optimizer of this model
        torch.default_generator.manual_seed(1)
        for _ in range(case.steps):
            self.step()
        self.fill_grads(case.grads)

    def groups(self) -> list[dict[str, object]]:
        outside = set(map(id, self.outside))
        inside = [p for p in self.model.parameters() if id(p) not in outside]
        if self.case.groups == 1:
            return [{"params": inside}]
        return [{"params": inside[:2]}, {"params": inside[2:], "lr": self.rate(0.02)}]

    def rate(self, value: float) -> Tensor | float:
        return torch.tensor(value) if self.case.tensor_lr else value

    def fill_grads(self, how: str) -> None:
        """Leave the last step's, or clear them, or put the user's own into some or all."""
        if how == "left":
            return
        for number, parameter in enumerate(self.model.parameters()):
            parameter.grad = None
            if how == "all" or (how == "some" and number % 2 == 0):
                values = torch.linspace(-0.5, 0.5, parameter.numel(), dtype=parameter.dtype)
                parameter.grad = (values * -0.0 if number == 2 else values).reshape(parameter.shape)

    def step(self, strike: Strike | None = None, **changes: Any) -> Tensor | None:
        return self.optimizer.step(self.objectives(strike, **changes))

    def nothing(self) -> None:
        """What a twin does that has nothing to do."""

    def loss(self, name: str, part: int, scores: Tensor | None = None) -> Tensor:
        number = self.shape.names.index(name)
        dtype = self.model.head.weight.dtype
        x, y = INPUT[number % 2].to(dtype), TARGET[part].roll(number, 0).to(dtype)
        scores = self.model(x) if scores is None else scores
        return (scores - y).square().mean() * (1 + number)

    def objectives(
        self, strike: Strike | None = None, names: Sequence[str] | None = None
    ) -> Objectives:
        """This case's objectives, one of which `strike` may spoil."""
        strike = strike or Strike(self, lambda loss: loss, harmless=True)
        form, names = self.shape.form, names or self.shape.names
        if self.shape.joint:
            make = self._joint_generator if form == "joint-generator" else self._joint
            return make(strike, names)
        make = {
            "generator": self._generator,
            "backward": self._backward,
        }.get(form.partition("-")[2], self._plain)
        if form in ONE:
            return make(strike, "loss")
        return {name: make(strike, name) for name in names}

    def _plain(self, strike: Strike, name: str) -> Callable[[], object]:
        def closure() -> object:
            strike.at("before", name, first=True)
            loss = strike.at("after", name, self.loss(name, 0))
            strike.at("end", name)
            return loss

        return closure

    def _generator(self, strike: Strike, name: str) -> Callable[[], object]:
        def closure() -> object:
            strike.at("before", name, first=True)
            yield self.loss(name, 0)
            yield strike.at("after", name, self.loss(name, 1))
            strike.at("end", name)

        return closure

    def _backward(self, strike: Strike, name: str) -> Callable[[], object]:
        def closure() -> object:
            self.optimizer.zero_grad()
            strike.at("before", name, first=True)
            true = self.loss(name, 0)
            loss = strike.at("after", name, true)
            (loss if _is_loss(loss) else true).backward()
            strike.at("end", name)
            return loss

        return closure

    def _losses(self, strike: Strike, names: Sequence[str], part: int, spoil: bool) -> object:
        scores = self.model(INPUT[part].to(self.model.head.weight.dtype))
        losses = {name: self.loss(name, part, scores) for name in names if name != "new"}
        if "new" in names:
            losses["new"] = scores.sum()
        if spoil:
            losses = {name: strike.at("after", name, loss) for name, loss in losses.items()}
        return losses

    def _joint(self, strike: Strike, names: Sequence[str]) -> Callable[[], object]:
        def closure() -> object:
            for name in names:
                strike.at("before", name, first=True)
            losses = self._losses(strike, names, 0, spoil=True)
            for name in names:
                strike.at("end", name)
            return losses

        return closure

    def _joint_generator(self, strike: Strike, names: Sequence[str]) -> Callable[[], object]:
        def closure() -> object:
            for name in names:
                strike.at("before", name, first=True)
            yield self._losses(strike, names, 0, spoil=False)
            yield self._losses(strike, names, 1, spoil=True)
            for name in names:
                strike.at("end", name)

        return closure


def _is_loss(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and value.numel() == 1
        and value.is_floating_point()
    )


class Strike:
    """Does something when the case's victim is computed for the case's n-th time."""

    def __init__(
        self,
        world: World,
        act: Callable[[Tensor], object],
        moment: Moment = "after",
        harmless: bool = False,
    ) -> None:
        self._act, self._moment = act, moment
        self._victim = None if harmless else world.case.victim
        self._visit = world.case.visit
        self._count = 0
        self.struck = harmless

    def at(self, moment: Moment, name: str, loss: Tensor | None = None, first: bool = False):
        """The loss that objective `name` is to go on with at this moment."""
        if name != self._victim:
            return loss
        self._count += first
        if moment != self._moment or self._count != self._visit + 1:
            return loss
        self.struck = True
        return self._act(torch.zeros(()) if loss is None else loss)
