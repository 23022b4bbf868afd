"""A problem with positive losses, and plain training loops that the weightings must equal.

Each reference knows, for the losses of a step, a scalar whose gradient is stepped on, by torch's
autograd: `begin` is called with the step's losses, `scalar` with those at any point of the step
(still to be differentiated), `end` after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from helpers import Perceptron, flat, forward, seeded
from torch import Tensor

import gradkit as gk

NAMES = ("a", "b", "c")
SCALES = (1.0, 3.0, 0.3)


def batches(count: int, *, same: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(4)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        return x, torch.randn(6, 4, generator=generator, dtype=torch.float64)

    first = draw()
    return [first if same or step == 0 else draw() for step in range(count)]


def losses_of(scores: Tensor, target: Tensor) -> Tensor:
    """Three losses of different sizes."""
    apart = (scores - target).square().mean(0)
    return torch.stack([scale * apart[k] for k, scale in enumerate(SCALES)])


def objectives(model: Perceptron, x: Tensor, y: Tensor, names: str = "abc") -> dict[str, Callable]:
    return {name: lambda name=name: losses_of(model(x), y)[NAMES.index(name)] for name in names}


class Equal:
    """The sum of the losses; what the references have in common."""

    def begin(self, losses: Tensor) -> None:
        pass

    def scalar(self, losses: Tensor) -> Tensor:
        return losses.sum()

    def end(self, losses: Tensor) -> None:
        pass


class RLW(Equal):
    def __init__(self, seed: int = 0) -> None:
        self.generator = seeded(seed)

    def begin(self, losses: Tensor) -> None:
        draws = torch.randn(len(losses), dtype=torch.float64, generator=self.generator)
        self.weights = F.softmax(draws, dim=-1)

    def scalar(self, losses: Tensor) -> Tensor:
        return (self.weights * losses).sum()


class UW(Equal):
    """All in one scalar, as in LibMTL, with a parameter group for s."""

    def __init__(self, lr: float = 0.025, initial: float = -0.5) -> None:
        self.lr, self.initial = lr, initial
        self.s: Tensor | None = None

    def begin(self, losses: Tensor) -> None:
        if self.s is None:
            self.s = torch.full_like(losses, self.initial).requires_grad_()
            self.optimizer = torch.optim.Adam([self.s], lr=self.lr)

    def scalar(self, losses: Tensor) -> Tensor:
        return (losses / (2 * self.s.exp()) + self.s / 2).sum()

    def end(self, losses: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scalar(losses).backward()
        self.optimizer.step()


class IMTLL(Equal):
    """All in one scalar, as in LibMTL, with a parameter group for s."""

    def __init__(self, lr: float = 0.025, initial: float = 0.0) -> None:
        self.lr, self.initial = lr, initial
        self.s: Tensor | None = None

    def begin(self, losses: Tensor) -> None:
        if self.s is None:
            self.s = torch.full_like(losses, self.initial).requires_grad_()
            self.optimizer = torch.optim.Adam([self.s], lr=self.lr)

    def scalar(self, losses: Tensor) -> Tensor:
        return (self.s.exp() * losses - self.s).sum()

    def end(self, losses: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scalar(losses).backward()
        self.optimizer.step()


class PBI(Equal):
    def __init__(self, theta: float, preference: list[float], ideal: list[float]) -> None:
        self.theta = theta
        self.preference = torch.tensor(preference, dtype=torch.float64)
        self.ideal = torch.tensor(ideal, dtype=torch.float64)

    def scalar(self, losses: Tensor) -> Tensor:
        f, p = losses - self.ideal[: len(losses)], self.preference[: len(losses)]
        d1 = (f @ p) / p.square().sum().sqrt()
        away = f - d1 * p / p.square().sum().sqrt()
        d2 = away.square().sum().sqrt()
        # On the ray it has no derivative.
        return d1 + self.theta * d2 if d2.detach() > 1e-14 * f.detach().norm() else d1


class COSMOS(Equal):
    """With torch's cosine, as in the authors' code."""

    def __init__(self, lmbda: float, preference: list[float] | None = None) -> None:
        self.lmbda, self.preference = lmbda, preference

    def scalar(self, losses: Tensor) -> Tensor:
        count = len(losses)
        r = torch.tensor(self.preference or [1 / count] * count, dtype=torch.float64)[:count]
        return (r * losses).sum() - self.lmbda * F.cosine_similarity(r, losses, dim=0)


class DWA(Equal):
    """Epoch by epoch."""

    def __init__(self, temperature: float = 2.0, steps_per_epoch: int = 1) -> None:
        self.temperature, self.steps_per_epoch = temperature, steps_per_epoch
        self.history: list[Tensor] = []

    def scalar(self, losses: Tensor) -> Tensor:
        n = self.steps_per_epoch
        epochs = len(self.history) // n
        if epochs < 2:
            return losses.sum()
        means = [torch.stack(self.history[e * n : (e + 1) * n]).mean(0) for e in range(epochs)]
        ratio = means[-1] / means[-2]
        return len(losses) * (F.softmax(ratio / self.temperature, dim=-1) * losses).sum()

    def end(self, losses: Tensor) -> None:
        self.history.append(losses)


class GLS(Equal):
    def scalar(self, losses: Tensor) -> Tensor:
        return losses.prod() ** (1 / len(losses))


class FAMO(Equal):
    """The paper's algorithm, with the losses after a step taken from the next one."""

    def __init__(self, lr: float = 0.025, decay: float = 1e-3, lowest: float = 0.0) -> None:
        self.lr, self.decay, self.lowest = lr, decay, lowest
        self.xi: Tensor | None = None

    def begin(self, losses: Tensor) -> None:
        if self.xi is None:
            self.xi = torch.zeros_like(losses, requires_grad=True)
            self.optimizer = torch.optim.Adam([self.xi], lr=self.lr, weight_decay=self.decay)
        else:
            self.update(losses)
        self.before = losses

    def update(self, after: Tensor) -> None:
        fall = self.offset(self.before).log() - self.offset(after).log()
        z = F.softmax(self.xi, dim=-1)
        (self.xi.grad,) = torch.autograd.grad(z, self.xi, grad_outputs=fall)
        self.optimizer.step()

    def offset(self, losses: Tensor) -> Tensor:
        return losses - self.lowest + 1e-8

    def scalar(self, losses: Tensor) -> Tensor:
        z = F.softmax(self.xi.detach(), dim=-1)
        c = 1 / (z / self.offset(losses).detach()).sum()
        return c * (z * self.offset(losses).log()).sum()


class STCH(Equal):
    def __init__(self, mu: float = 1.0, warmup_steps: int = 3, nadir_steps: int = 2) -> None:
        self.mu, self.warmup_steps, self.nadir_steps = mu, warmup_steps, nadir_steps
        self.history: list[Tensor] = []

    def scalar(self, losses: Tensor) -> Tensor:
        end = self.warmup_steps + self.nadir_steps
        if len(self.history) < end:
            return losses.log().sum()
        nadir = torch.stack(self.history[self.warmup_steps : end]).mean(0)
        x = (losses / nadir).log() / self.mu
        return self.mu * len(losses) * torch.logsumexp(x, dim=0)

    def end(self, losses: Tensor) -> None:
        self.history.append(losses)


RAY = [1.0, 0.5, 2.0, 0.0]
LOW = [0.1, -0.2, 0.05, 0.0]


def by_name(numbers: list[float]) -> dict[str, float]:
    """For the names in a step, and for those of a call alone."""
    return {**dict(zip(NAMES, numbers, strict=False)), **dict(zip("0123", numbers, strict=True))}


# Each weighting beside its reference.
PAIRS: dict[str, tuple[Callable[[], gk.weighting.LossWeighting], Callable[[], Equal]]] = {
    "rlw": (gk.RLW, RLW),
    "uw": (gk.UW, UW),
    "uw-other": (lambda: gk.UW(lr=0.3, initial=1.0), lambda: UW(0.3, 1.0)),
    "dwa": (gk.DWA, DWA),
    "dwa-epochs": (lambda: gk.DWA(0.5, steps_per_epoch=3), lambda: DWA(0.5, 3)),
    "gls": (gk.GLS, GLS),
    "famo": (gk.FAMO, FAMO),
    "famo-other": (lambda: gk.FAMO(0.3, 0.1, -0.2), lambda: FAMO(0.3, 0.1, -0.2)),
    "stch": (lambda: gk.STCH(warmup_steps=3, nadir_steps=2), STCH),
    "stch-sharp": (
        lambda: gk.STCH(mu=0.1, warmup_steps=0, nadir_steps=1),
        lambda: STCH(0.1, 0, 1),
    ),
    "imtll": (gk.IMTLL, IMTLL),
    "imtll-other": (lambda: gk.IMTLL(lr=0.3, initial=1.0), lambda: IMTLL(0.3, 1.0)),
    "pbi": (gk.PBI, lambda: PBI(5.0, [1.0] * 4, [0.0] * 4)),
    "pbi-other": (
        lambda: gk.PBI(by_name(RAY), 0.4, by_name(LOW)),
        lambda: PBI(0.4, RAY, LOW),
    ),
    "cosmos": (gk.COSMOS, lambda: COSMOS(2.0)),
    "cosmos-other": (
        lambda: gk.COSMOS(by_name(RAY), 0.1),
        lambda: COSMOS(0.1, RAY),
    ),
}

# Each once, as short as it can be, for properties of all.
WEIGHTINGS: dict[str, Callable[[], gk.weighting.LossWeighting]] = {
    "rlw": gk.RLW,
    "uw": gk.UW,
    "dwa": gk.DWA,
    "gls": gk.GLS,
    "famo": gk.FAMO,
    "stch": lambda: gk.STCH(warmup_steps=1, nadir_steps=1),
    "imtll": gk.IMTLL,
    "pbi": gk.PBI,
    "cosmos": gk.COSMOS,
}


def reference_training(
    reference: Equal, data: list[tuple[Tensor, Tensor]], rho: float = 0.0, lr: float = 0.05
) -> Iterator[Tensor]:
    """Gradient descent, or SAM, on the reference's scalar; yields the weights after each step."""
    weights = [parameter.detach().clone() for parameter in Perceptron().parameters()]

    def gradient(at: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        at = [weight.clone().requires_grad_() for weight in at]
        return list(torch.autograd.grad(reference.scalar(losses_of(forward(x, *at), y)), at))

    for x, y in data:
        losses = losses_of(forward(x, *weights), y)
        reference.begin(losses)
        found = gradient(weights, x, y)
        if rho:
            factor = rho / flat(found).norm()
            there = [weight + factor * part for weight, part in zip(weights, found, strict=True)]
            found = gradient(there, x, y)
        reference.end(losses)
        weights = [weight - lr * part for weight, part in zip(weights, found, strict=True)]
        yield flat(weights)


def wrapped(model: Perceptron, *transforms: gk.Transform, lr: float = 0.05, **options):
    base = torch.optim.SGD(model.parameters(), lr=lr)
    return gk.wrap(base, *transforms, model=model, **options)
