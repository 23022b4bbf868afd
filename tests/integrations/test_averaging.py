"""Weight averaging, checkpointed activations, clipping from outside, and saved state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from gradkit.testing import bits as plain
from integrations.references import (
    assert_close,
    assert_equal,
    clipped,
    data,
    error,
    gradient,
    move,
    network,
    sam,
)

ENGINES = ["functional", "inplace"]
BATCHES = data(6)


def sgd(net: nn.Module, *transforms: gk.Transform, engine: str = "auto") -> gk.GradientOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return gk.wrap(base, *transforms, model=net, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_averaged_weights_equal_those_of_a_bare_run(engine: str) -> None:
    def run(wrapped: bool) -> tuple[nn.Module, AveragedModel, list[float]]:
        net = network()
        averaged = AveragedModel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if wrapped:
            optimizer = gk.wrap(optimizer, gk.PCGrad(), model=net, engine=engine)
        scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        rates = []
        for batch in BATCHES:

            def closure(batch: tuple = batch) -> Tensor:
                optimizer.zero_grad()
                loss = error(net, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
            averaged.update_parameters(net)
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        update_bn(BATCHES, averaged)
        return net, averaged, rates

    (net, averaged, rates), (bare_net, bare_averaged, bare_rates) = run(True), run(False)
    assert rates == bare_rates
    assert_equal(net, bare_net)
    assert_equal(averaged, bare_averaged)
    assert averaged.n_averaged == len(BATCHES)


def test_torchs_moving_average_equals_ema() -> None:
    net = network()
    follow = gk.EMA(net, decay=0.9)
    optimizer = sgd(net, gk.SAM(rho=0.5), follow)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(net)  # its first update is a copy
    for batch in BATCHES:
        optimizer.step(lambda: error(net, batch))
        averaged.update_parameters(net)
    pairs = zip(follow.teacher.parameters(), averaged.module.parameters(), strict=True)
    assert all(torch.allclose(ours, theirs, rtol=1e-12) for ours, theirs in pairs)
    assert not torch.allclose(follow.teacher[0].weight, net[0].weight)


class Checkpointed(nn.Module):
    """The first part's activations are computed again on the way back; it has dropout."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        net = network()
        self.first = nn.Sequential(net[0], net[2], nn.Dropout(0.4))
        self.last = net[3]
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "none":
            return self.last(self.first(x))
        x = x.clone().requires_grad_()
        return self.last(checkpoint(self.first, x, use_reentrant=self.mode == "reentrant"))


def trained(mode: str, engine: str, form: str) -> nn.Module:
    net = Checkpointed(mode)
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    torch.manual_seed(1)
    for batch in BATCHES:

        def loss(batch: tuple = batch) -> Tensor:
            return error(net, batch)

        def backward(batch: tuple = batch) -> Tensor:
            optimizer.zero_grad()
            value = error(net, batch)
            value.backward()
            return value

        optimizer.step(loss if form == "loss" else backward)
    return net


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("mode", "form"),
    [("non-reentrant", "loss"), ("non-reentrant", "backward"), ("reentrant", "backward")],
)
def test_checkpointed_activations_change_nothing(mode: str, form: str, engine: str) -> None:
    assert_close(trained(mode, engine, form), trained("none", engine, form))


def test_a_reentrant_checkpoint_is_refused_where_it_would_hide_parameters() -> None:
    before = plain(Checkpointed("reentrant").state_dict())
    for engine in ENGINES:
        net = Checkpointed("reentrant")
        optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
        with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
            optimizer.step(lambda: error(net, BATCHES[0]))
        assert plain(net.state_dict()) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_clipping_from_outside_in_a_step_without_closure(engine: str) -> None:
    net, expected = network(), network()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.PCGrad(), model=net, engine=engine)
    for batch in BATCHES:
        optimizer.zero_grad()
        error(net, batch).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.2)
        assert norm > 0.2
        optimizer.step()
        clipped_by_hand = clipped(gradient(error(expected, batch), expected.parameters()), 0.2)
        move(expected.parameters(), -0.1, clipped_by_hand)
    assert_close(net, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_clipping_inside_the_closure_acts_on_each_evaluation(engine: str) -> None:
    net, expected = network(), network()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(rho=0.5), model=net, engine=engine)
    for batch in BATCHES:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = error(net, batch)
            loss.backward()
            nn.utils.clip_grad_value_(net.parameters(), 0.05)
            return loss

        optimizer.step(closure)

        def take() -> list[Tensor]:
            gradients = gradient(error(expected, batch), expected.parameters())
            return [each.clamp(-0.05, 0.05) for each in gradients]

        move(expected.parameters(), -0.1, sam(expected, take, rho=0.5))
    assert_close(net, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_clipping_the_optimizers_groups_inside_the_closure(engine: str) -> None:
    net, expected = network(), network()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, model=net, engine=engine)
    for batch in BATCHES:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = error(net, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05)
            return loss

        optimizer.step(closure)
        taken = gradient(error(expected, batch), expected.parameters())
        move(expected.parameters(), -0.1, clipped(taken, 0.05))
    assert_close(net, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_that_adds_to_earlier_gradients_is_right_or_refused(engine: str) -> None:
    net, expected = network(), network()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gk.wrap(base, model=net, engine=engine)
    (error(net, BATCHES[0]) / 2).backward()

    def closure() -> Tensor:
        loss = error(net, BATCHES[1]) / 2
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except RuntimeError as refusal:
        if "generator" not in str(refusal):
            raise
    else:
        both = (error(expected, BATCHES[0]) + error(expected, BATCHES[1])) / 2
        move(expected.parameters(), -0.1, gradient(both, expected.parameters()))
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs)


CHAINS: dict[str, Callable[[nn.Module], tuple[gk.Transform, ...]]] = {
    "none": lambda net: (),
    "PCGrad, SAM": lambda net: (gk.PCGrad(), gk.SAM()),
    "CosineLR, EMA": lambda net: (
        gk.CosineLR("a", "b"),
        gk.EMA(net, decay=0.9, warmup=True, in_state=True),
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["Adam", "SGD", "Rprop", "Adafactor"])
def test_a_file_of_plain_values_resumes_bit_for_bit(name: str, chain: str, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, gk.GradientOptimizer]:
        net = network()
        base = getattr(torch.optim, name)(net.parameters(), lr=0.01)
        return net, gk.wrap(base, *CHAINS[chain](net), model=net)

    def run(net: nn.Module, optimizer: gk.GradientOptimizer, batches: list) -> None:
        for batch in batches:
            objectives = {
                "a": lambda: error(net, batch),
                "b": lambda: -net(batch[0])[:, 0].tanh().mean(),
                "c": lambda: net(batch[0].flip(0))[:, 1].mean(),
            }
            optimizer.step(objectives)

    net, optimizer = make()
    run(net, optimizer, BATCHES[:3])
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    resumed_net, resumed = make()
    saved = torch.load(tmp_path / "run.pt", weights_only=True, mmap=True)
    resumed_net.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert plain(resumed.state_dict()) == plain(optimizer.state_dict())
    run(net, optimizer, BATCHES[3:])
    run(resumed_net, resumed, BATCHES[3:])
    assert_equal(resumed_net, net)
    assert plain(resumed.state_dict()) == plain(optimizer.state_dict())
