"""Accelerate in one process: a prepared optimizer is stepped through its wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
    pcgrad,
    sam,
)

ENGINES = ["functional", "inplace"]
BATCHES = data(6)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings in the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader() -> DataLoader:
    samples = [sample for x, y in BATCHES for sample in zip(x, y, strict=True)]
    return DataLoader(samples, batch_size=4)


def sgd(net: nn.Module, *transforms: gk.Transform, **options: Any) -> gk.GradientOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return gk.wrap(base, *transforms, model=net, **options)


def by_hand(take_gradient) -> nn.Module:
    net = network()
    for batch in BATCHES:
        move(net.parameters(), -0.1, take_gradient(net, batch))
    return net


def plain_gradient(net: nn.Module, batch: tuple) -> list[Tensor]:
    return gradient(error(net, batch), net.parameters())


def sam_gradient(net: nn.Module, batch: tuple) -> list[Tensor]:
    return sam(net, lambda: plain_gradient(net, batch), rho=0.5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ["wrap first", "prepare first"])
def test_a_closure_that_returns_the_loss(order: str, engine: str) -> None:
    accelerator = Accelerator(cpu=True)
    net = network()
    if order == "prepare first":
        net = accelerator.prepare(net)
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    for batch in batches:
        assert optimizer.step(lambda: error(net, batch)) is None  # Accelerate keeps the loss
        assert torch.isfinite(optimizer.optimizer.last_step.losses[0])
    assert_close(net, by_hand(sam_gradient))
    assert torch.allclose(optimizer.optimizer.last_step.losses[0], _last_first_loss(sam_gradient))


def _last_first_loss(take_gradient) -> Tensor:
    net = network()
    for batch in BATCHES[:-1]:
        move(net.parameters(), -0.1, take_gradient(net, batch))
    return error(net, BATCHES[-1]).detach()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_that_calls_accelerators_backward(engine: str, clip: float | None) -> None:
    """Clipping inside the closure acts on each evaluation, in either engine."""
    accelerator = Accelerator(cpu=True)
    net = network()
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader())

    for batch in batches:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = error(net, batch)
            accelerator.backward(loss)
            if clip is not None:
                accelerator.clip_grad_value_(net.parameters(), clip)
            return loss

        optimizer.step(closure)

    def expected(net: nn.Module, batch: tuple) -> list[Tensor]:
        def take() -> list[Tensor]:
            gradients = plain_gradient(net, batch)
            return gradients if clip is None else [each.clamp(-clip, clip) for each in gradients]

        return sam(net, take, rho=0.5)

    assert_close(net, by_hand(expected))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["mapping", "callable"])
def test_several_objectives(form: str, engine: str) -> None:
    accelerator = Accelerator(cpu=True)
    net = network()
    optimizer = sgd(net, gk.PCGrad(), engine=engine)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    cosines = []
    for batch in batches:

        def sign() -> Tensor:
            return -net(batch[0])[:, 0].tanh().mean()

        closures = {"error": lambda: error(net, batch), "sign": sign}
        if form == "mapping":
            optimizer.step(closures)
        else:
            optimizer.step(lambda: {name: closure() for name, closure in closures.items()})
        cosines.append(optimizer.optimizer.last_step.cosine("error", "sign"))

    def expected(net: nn.Module, batch: tuple) -> list[Tensor]:
        losses = (error(net, batch), -net(batch[0])[:, 0].tanh().mean())
        return pcgrad(*(gradient(loss, net.parameters()) for loss in losses))

    assert_close(net, by_hand(expected))
    assert min(cosines) < 0  # a conflict among them


@pytest.mark.parametrize("engine", ENGINES)
def test_a_generator_accumulates_to_the_whole_batch(engine: str) -> None:
    accelerator = Accelerator(cpu=True)
    net = network().eval()  # BatchNorm would see halves
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    for x, y in batches:

        def halves() -> Iterator[Tensor]:
            for part in (slice(0, 2), slice(2, 4)):
                yield error(net, (x[part], y[part])) / 2

        optimizer.step(halves)

    def whole(net: nn.Module, batch: tuple) -> list[Tensor]:
        return sam(net.eval(), lambda: plain_gradient(net, batch), rho=0.5)

    assert_close(net, by_hand(whole))


def test_accelerates_own_accumulation_never_runs_the_closures_in_between() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = network()
    net, optimizer, batches = accelerator.prepare(net, sgd(net, gk.SAM(rho=0.5)), loader())
    seen = []
    for number, batch in enumerate(batches):

        def closure() -> Tensor:
            seen.append(number)
            return error(net, batch)

        with accelerator.accumulate(net):
            optimizer.step(closure)
    assert seen == [1, 1, 3, 3, 5, 5]


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerates_own_accumulation_without_closures(engine: str) -> None:
    """Chains of one evaluation step on what `.grad` holds, as the bare optimizer does."""

    def run(make) -> nn.Module:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = network()
        net, optimizer, batches = accelerator.prepare(net, make(net), loader())
        for batch in batches:
            with accelerator.accumulate(net):
                accelerator.backward(error(net, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return net

    bare = run(lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    assert_equal(run(lambda net: sgd(net, gk.PCGrad(), engine=engine)), bare)
    net = network()
    for first, second in zip(BATCHES[::2], BATCHES[1::2], strict=True):
        both = (error(net, first) + error(net, second)) / 2
        move(net.parameters(), -0.1, clipped(gradient(both, net.parameters()), 0.5))
    assert_close(bare, net)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_at_both_points(engine: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net = network().float()
    plain_net = network().float()
    optimizer = sgd(net, gk.SAM(rho=0.5), engine=engine)
    net, optimizer = accelerator.prepare(net, optimizer)
    for batch in BATCHES:
        x, y = batch[0].float(), batch[1].float()
        optimizer.step(lambda: error(net, (x, y)))

        def take(x: Tensor = x, y: Tensor = y) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                scores = plain_net(x)
            return gradient((scores.float() - y).square().mean(), plain_net.parameters())

        move(plain_net.parameters(), -0.1, sam(plain_net, take, rho=0.5))
    assert_close(net, plain_net, tolerance=1e-3)
    with pytest.raises(AssertionError):
        assert_close(net, by_hand(sam_gradient), tolerance=1e-3)


class Run:
    """All that one run holds: PCGrad that draws, a teacher, a scheduler, dropout."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        net = nn.Sequential(network(), nn.Dropout(0.3))
        self.follow = gk.EMA(net, decay=0.9, warmup=True)
        base = torch.optim.Adam(net.parameters(), lr=0.05)
        optimizer = gk.wrap(base, gk.PCGrad(), gk.SAM(), self.follow, model=net)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        self.net, self.optimizer, self.scheduler = self.accelerator.prepare(
            net, optimizer, scheduler
        )
        self.accelerator.register_for_checkpointing(self.follow.teacher)

    def steps(self, batches: list) -> None:
        for batch in batches:
            self.optimizer.step(
                {
                    "error": lambda: error(self.net, batch),
                    "sign": lambda: -self.net(batch[0])[:, 0].tanh().mean(),
                    "third": lambda: self.net(batch[0].flip(0))[:, 1].mean(),
                }
            )
            self.scheduler.step()


# The teacher is loaded after the optimizer.
@pytest.mark.filterwarnings("ignore:the teacher of EMA is not the one that was saved")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = Run()
    whole.steps(BATCHES[:3])
    whole.accelerator.save_state(tmp_path / "state")
    whole.steps(BATCHES[3:])
    torch.manual_seed(4)
    resumed = Run()
    resumed.steps(BATCHES[:1])  # its own state must give way
    resumed.accelerator.load_state(tmp_path / "state")
    resumed.steps(BATCHES[3:])
    assert_equal(resumed.net, whole.net)
    assert_equal(resumed.follow.teacher, whole.follow.teacher)
    assert plain(resumed.optimizer.state_dict()) == plain(whole.optimizer.state_dict())
    assert resumed.follow.state == {"t": 6}
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert resumed.scheduler.get_last_lr() == pytest.approx([0.05 * 0.9**6])
