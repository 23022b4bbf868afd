"""NaNs and infinities: where they come from, and what counts as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain

ENGINES = ["functional", "inplace"]
INPUT = torch.linspace(-1, 1, 24).reshape(8, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_a_step_at_learning_rate_zero_is_a_step() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.0, momentum=0.9), max_norm=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert torch.allclose(momentum, torch.tensor([0.6, 0.8]), atol=1e-5)
    weight.grad = torch.tensor([torch.nan, 0.0])
    with pytest.raises(gk.NonFiniteError):
        optimizer.step()


class ToNaN(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(weights=gradients.weights * torch.nan)

        return oracle


class UpdateToNaN(gk.Transform):
    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            return gradients.replace(update=gradients.direction() / 0 * 0)

        return oracle


@pytest.mark.parametrize("transform", [ToNaN, UpdateToNaN])
def test_a_transform_that_returns_nan(transform) -> None:
    model = network()
    before = plain(model.state_dict())
    optimizer = gk.wrap(sgd(model), transform(), model=model)
    with pytest.raises(gk.NonFiniteError, match="transforms' result is not finite"):
        optimizer.step(lambda: model(INPUT).sum())
    optimizer.options.nonfinite = "skip"
    optimizer.step(lambda: model(INPUT).sum())
    assert plain(model.state_dict()) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_code_that_fails_on_weights_displaced_by_nan(engine: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = gk.wrap(sgd(model), gk.SAM(), model=model, engine=engine)

    def closure():
        if torch.isnan(model.weight).any():
            raise ValueError("I will have no NaN")
        return model.weight.sum() * torch.nan

    with pytest.raises(gk.NonFiniteError, match="loss of objective 'loss' is nan") as caught:
        optimizer.step(closure)
    assert isinstance(caught.value.__cause__, ValueError)
    optimizer.options.nonfinite = "skip"
    optimizer.step(closure)
    assert not optimizer.last_step.applied
    with pytest.raises(ValueError, match="Expected parameter"):  # an error of its own is no NaN
        optimizer.step(lambda: torch.distributions.Normal(torch.nan, 1.0, validate_args=True))


def test_an_infinite_gradient_of_a_finite_loss_is_found() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(gk.NonFiniteError, match="gradient of objective 'root' is not finite"):
        optimizer.step({"fine": lambda: weight.sum(), "root": lambda: weight.sqrt().sum()})
    optimizer.options.nonfinite = "ignore"
    optimizer.step({"root": lambda: weight.sqrt().sum()})
    assert not weight.isfinite().item()


class _Huge(gk.Transform):
    """Weights that are finite in float64 only, or rows that no evaluation has seen."""

    def __init__(self, what: str) -> None:
        self.what = what

    def around(self, inner, context):
        def oracle(at=None, only=None):
            gradients = inner(at, only)
            if self.what == "weights":
                return gradients.replace(weights=gradients.weights * 1e60)
            return gradients.replace(rows=gradients.rows * torch.inf)

        return oracle


@pytest.mark.parametrize("what", ["weights", "rows"])
def test_a_direction_that_overflows_is_not_applied(what: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), _Huge(what))
    closures = {"a": lambda: weight.sum(), "b": lambda: weight.square().sum()}
    with pytest.raises(gk.NonFiniteError, match="the transforms' result is not finite"):
        optimizer.step(closures)
    assert weight.tolist() == [1.0, 1.0]
    optimizer.options.nonfinite = "skip"
    optimizer.step(closures)
    assert weight.tolist() == [1.0, 1.0]
    assert not optimizer.last_step.applied


def test_a_float16_direction_longer_than_the_largest_number_is_applied() -> None:
    weight = nn.Parameter(torch.ones(10_000, dtype=torch.float16))
    optimizer = gk.wrap(torch.optim.SGD([weight], lr=1e-3))
    optimizer.step(lambda: (weight * 1000).float().sum())
    assert optimizer.last_step.applied
    assert weight.isfinite().all()


def test_gradients_of_any_finite_size_are_finite() -> None:
    for scale in (1e-25, 1e20):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = gk.wrap(torch.optim.SGD([weight], lr=1.0), max_norm=1.0)
        optimizer.step(
            {
                "a": lambda w=weight, s=scale: w[0] * s,
                "b": lambda w=weight, s=scale: (w[0] + w[1]) * s,
            }
        )
        assert torch.allclose(optimizer.last_step.cosine("a", "b"), torch.tensor(0.5**0.5))
