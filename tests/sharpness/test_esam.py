"""ESAM's choice of samples, and objectives that return one loss per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import flat, seeded
from torch import Tensor, nn

import gradkit as gk

ENGINES = ("inplace", "functional")
LR, RHO, BETA, GAMMA = 0.05, 0.3, 0.7, 0.4
X = torch.randn(10, 3, generator=seeded(1), dtype=torch.float64)
Y = torch.randn(10, 2, generator=seeded(2), dtype=torch.float64)
Samples = Tensor | None


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Tanh(), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def each(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean(1)


def whole(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: each(model, X, Y)


def sampled(model: nn.Module) -> Callable[..., Tensor]:
    def closure(samples: Samples = None) -> Tensor:
        chosen = slice(None) if samples is None else samples
        return each(model, X[chosen], Y[chosen])

    return closure


def micro_batches(model: nn.Module) -> Callable[[], Iterator[Tensor]]:
    def closure() -> Iterator[Tensor]:
        for part in (slice(0, 4), slice(4, 10)):
            yield each(model, X[part], Y[part]) * len(X[part]) / len(X)

    return closure


def by_hand(steps: int, parts: tuple[slice, ...], norm: bool = False) -> Tensor:
    """The weights after some steps of SGD, where the share GAMMA of each part is kept."""
    model, generator = network(norm), seeded(5)
    parameters = [*model.parameters()]

    def gradient(loss: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(loss, parameters)]

    for _ in range(steps):
        weights = [p.detach().clone() for p in parameters]
        drawn = (torch.rand(len(parameters), generator=generator) < BETA).tolist()
        before = each(model, X, Y)
        ascent = [g * d for g, d in zip(gradient(before.mean()), drawn, strict=True)]
        scale = RHO / BETA / (flat(ascent).norm() + 1e-12)
        with torch.no_grad():
            for p, e in zip(parameters, ascent, strict=True):
                p += scale * e
        rise = (each(model, X, Y) - before).detach()
        loss: Any = 0.0
        for part in parts:
            found = rise[part].topk(int(GAMMA * len(rise[part]))).indices
            loss = loss + each(model, X[part][found], Y[part][found]).mean() * len(X[part]) / len(X)
        step = gradient(loss)
        with torch.no_grad():
            for p, w, g in zip(parameters, weights, step, strict=True):
                p.copy_(w - LR * g)
    return flat(parameters)


def wrapped(model: nn.Module, **options: Any) -> Any:
    base = torch.optim.SGD(model.parameters(), lr=LR)
    transform = gk.ESAM(rho=RHO, beta=BETA, gamma=GAMMA, generator=seeded(5))
    return gk.wrap(base, transform, model=model, **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", [whole, sampled, micro_batches], ids=lambda f: f.__name__)
def test_it_descends_on_the_samples_whose_losses_rise_most(form: Any, engine: str) -> None:
    model = network()
    optimizer = wrapped(model, engine=engine)
    for _ in range(4):
        before = each(model, X, Y).mean().detach()
        loss = optimizer.step(form(model))
        torch.testing.assert_close(loss, before)
    parts = (slice(0, 4), slice(4, 10)) if form is micro_batches else (slice(0, 10),)
    torch.testing.assert_close(flat(model.parameters()), by_hand(4, parts), rtol=1e-9, atol=1e-11)


def test_batch_norm_sees_the_chosen_samples_alone_where_the_closure_takes_them() -> None:
    model = network(norm=True)
    optimizer = wrapped(model)
    statistics: Any = model[1].running_mean
    for count in (1, 2):
        optimizer.step(sampled(model))
        assert model[1].num_batches_tracked == count  # of the first evaluations only
    assert torch.isfinite(statistics).all()
    torch.testing.assert_close(
        flat(model.parameters()), by_hand(2, (slice(0, 10),), norm=True), rtol=1e-9, atol=1e-11
    )


def test_the_second_pass_runs_on_the_chosen_samples_alone() -> None:
    model, seen = network(), []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    wrapped(model).step(sampled(model))
    assert seen == [(10, True), (10, False), (4, True)]


@pytest.mark.parametrize("joint", [False, True])
def test_around_surgery_each_objective_chooses_its_own(joint: bool) -> None:
    model, hand = network(), network()

    def losses(net: nn.Module) -> dict[str, Tensor]:
        error = net(X) - Y
        return {"a": error[:, 0].square(), "b": error[:, 1].abs()}

    base = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer = gk.wrap(base, gk.MGDA(), gk.ESAM(rho=RHO, beta=1.0, gamma=GAMMA), model=model)
    one_by_one = {name: lambda name=name: losses(model)[name] for name in "ab"}
    optimizer.step((lambda: losses(model)) if joint else one_by_one)

    parameters = [*hand.parameters()]
    w = flat(parameters)

    def rows(chosen: dict[str, Tensor]) -> Tensor:
        found = losses(hand)
        grads = [
            torch.autograd.grad(found[name][index].mean(), parameters, retain_graph=True)
            for name, index in chosen.items()
        ]
        return torch.stack([flat(grad) for grad in grads])

    before = {name: loss.detach() for name, loss in losses(hand).items()}
    d = gk.MGDA()(rows(dict.fromkeys("ab", torch.arange(10))))
    nn.utils.vector_to_parameters(w + RHO * d / d.norm(), parameters)
    rises = {name: loss.detach() - before[name] for name, loss in losses(hand).items()}
    step = gk.MGDA()(rows({name: rise.topk(4).indices for name, rise in rises.items()}))
    torch.testing.assert_close(flat(model.parameters()), w - LR * step, rtol=1e-9, atol=1e-11)


def test_a_loss_scale_changes_nothing_but_rounding() -> None:
    ends = []
    for scaled in (False, True):
        model = network().float()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        optimizer = wrapped(model, scaler=scaler)

        def loss(model: nn.Module = model, samples: Samples = None) -> Tensor:
            chosen = slice(None) if samples is None else samples
            with torch.autocast("cpu", torch.bfloat16):
                return each(model, X[chosen].float(), Y[chosen].float())

        for _ in range(2):
            optimizer.step(loss)
        assert optimizer.last_step.applied
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ends[0], flat(network().float().parameters()))


def test_inside_an_autocast_region_the_weights_of_the_second_pass_have_a_graph() -> None:
    model = network().float()
    optimizer = wrapped(model)

    def loss(samples: Samples = None) -> Tensor:
        chosen = slice(None) if samples is None else samples
        return each(model, X[chosen].float(), Y[chosen].float())

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(loss)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_it_cannot_choose_from_is_refused() -> None:
    model = network()
    optimizer = wrapped(model)
    weights = flat(model.parameters())
    sizes = iter((10, 9))
    with pytest.raises(ValueError, match=r"'loss' returned a tensor of shape \(\); return one"):
        optimizer.step(lambda: each(model, X, Y).mean())
    with pytest.raises(ValueError, match=r"of shape \(10, 2\)"):
        optimizer.step(lambda: model(X) - Y)
    with pytest.raises(ValueError, match="returned 10 losses at the weights and 9 at"):
        optimizer.step(lambda: each(model, X, Y)[: next(sizes)])

    def backward() -> Tensor:
        losses = each(model, X, Y)
        losses.mean().backward()
        return losses.detach()

    with pytest.raises(RuntimeError, match="called backward, so that no samples can be chosen"):
        optimizer.step(backward)

    def generator(samples: Samples = None) -> Iterator[Tensor]:
        yield each(model, X, Y)

    with pytest.raises(TypeError, match="takes samples= and returned a generator"):
        optimizer.step(generator)
    assert torch.equal(flat(model.parameters()), weights)
    with pytest.raises(ValueError, match="a loss is one number"):
        gk.wrap(torch.optim.SGD(model.parameters(), lr=LR), gk.SAM()).step(whole(model))
    for name in ("beta", "gamma"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            gk.ESAM(**{name: 0.0})


def test_where_losses_are_maximised_the_samples_are_those_that_fall_most() -> None:
    ends = []
    for sign in (1.0, -1.0):
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=LR, maximize=sign < 0)
        optimizer = gk.wrap(base, gk.ESAM(rho=RHO, gamma=GAMMA), model=model)
        for _ in range(3):
            optimizer.step(lambda sign=sign: sign * each(model, X, Y))
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)
