"""A small network, and plain loops that adapters must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    ).to(dtype)
    for layer in (model[1], model[5]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return model


def images(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 3, 12, 16, generator=generator, dtype=dtype) for _ in range(count)]


# An independent GraTa: explicit weights, no gradkit, BatchNorm by its formula.


def reference_moments(x: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(dim=(0, 2, 3))
    return mean, ((x - mean.view(1, -1, 1, 1)) ** 2).mean(dim=(0, 2, 3))


def reference_forward(
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    moments=reference_moments,
    change_features=lambda x: x,
) -> torch.Tensor:
    def normalised(x: torch.Tensor, layer: str) -> torch.Tensor:
        mean, var = (each.view(1, -1, 1, 1) for each in moments(x, layer))
        scale, shift = (weights[f"{layer}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = F.conv2d(x, weights["0.weight"], weights["0.bias"], padding=1)
    x = change_features(normalised(x, "1").relu())
    x = F.conv2d(x, weights["4.weight"], weights["4.bias"], padding=1)
    x = normalised(x, "5").relu()
    return F.conv2d(x, weights["7.weight"], weights["7.bias"])


def reference_entropy(logits: torch.Tensor) -> torch.Tensor:
    p = 1 / (1 + (-logits).exp())
    return -(p * (p + 1e-6).log()).sum(dim=1).mean()


class ReferenceAdam:
    def __init__(self) -> None:
        self.t = 0
        self.m: dict[str, torch.Tensor] = {}
        self.v: dict[str, torch.Tensor] = {}

    def step(self, weights, grads, lr: float) -> None:
        self.t += 1
        for name, grad in grads.items():
            self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * grad
            self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * grad**2
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            weights[name] = (weights[name] - lr * m / (v.sqrt() + 1e-8)).detach()


def gradients(weights, names, loss_of) -> dict[str, torch.Tensor]:
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    grads = torch.autograd.grad(loss_of({**weights, **leaves}), [leaves[name] for name in names])
    return dict(zip(names, grads, strict=True))


def reference_views(x: torch.Tensor) -> list[tuple[torch.Tensor, object]]:
    views = [
        (x, lambda y: y),
        (x.flip(-1), lambda y: y.flip(-1)),
        (x.flip(-2), lambda y: y.flip(-2)),
    ]
    views += [
        (x.rot90(turns, (-2, -1)), lambda y, k=turns: y.rot90(-k, (-2, -1))) for turns in (1, 2, 3)
    ]
    return views


AFFINE = [f"{layer}.{part}" for layer in (1, 5) for part in ("weight", "bias")]


def source_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def running(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance of the source, by layer."""
    return {
        name: (model[int(name)].running_mean.clone(), model[int(name)].running_var.clone())
        for name in ("1", "5")
    }


def binary(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each sigmoid, in nats."""
    p = 1 / (1 + (-logits).exp())
    return -(p * p.log() + (1 - p) * (1 - p).log())


class ReferenceMomentum:
    """SGD with a momentum of 0.9, as torch's: the first step is the gradient's."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.m: dict[str, torch.Tensor] = {}

    def step(self, weights, grads) -> None:
        for name, grad in grads.items():
            self.m[name] = 0.9 * self.m[name] + grad if name in self.m else grad
            weights[name] = (weights[name] - self.lr * self.m[name]).detach()
