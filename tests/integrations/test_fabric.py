"""Lightning Fabric in one process: an optimizer that is set up is stepped through its wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

import gradkit as gk
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

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 deprecates.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
]
TOLERANCE = 1e-6  # Fabric returns a module's outputs in float32
ENGINES = ["functional", "inplace"]
BATCHES = data(3)
NAMES = ("a", "b")
Losses = dict[str, Tensor]


def sgd(net: nn.Module, *transforms: gk.Transform, **options: Any) -> gk.GradientOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return gk.wrap(base, *transforms, model=net, **options)


def doubles() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision="64-true")


def columns(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
    return dict(zip(NAMES, (net(batch[0]).double() - batch[1]).square().mean(0), strict=True))


def by_hand(take: Callable[[nn.Module, tuple[Tensor, Tensor]], list[Tensor]]) -> nn.Module:
    net = network()
    for batch in BATCHES:
        move(net.parameters(), -0.1, take(net, batch))
    return net


def sharp(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    return sam(net, lambda: gradient(error(net, batch), net.parameters()), rho=0.5)


def surgical(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    losses = columns(net, batch)
    rows = [torch.autograd.grad(losses[name], list(net.parameters()), retain_graph=True)
            for name in NAMES]  # fmt: skip
    return pcgrad(*map(list, rows))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["returned", "backward", "generator"])
def test_sam_equals_the_loop_by_hand(way: str, engine: str) -> None:
    fabric, net = doubles(), network()
    model, optimizer = fabric.setup(net, sgd(net, gk.SAM(rho=0.5), engine=engine))
    for batch in BATCHES:

        def closure(batch: tuple = batch) -> Tensor:
            loss = error(model, batch)
            if way == "backward":
                optimizer.zero_grad()
                fabric.backward(loss)
            return loss

        def whole(batch: tuple = batch) -> Any:
            yield error(model, batch)

        loss = optimizer.step(whole if way == "generator" else closure)
        assert torch.equal(loss, optimizer.last_step.losses.sum())
    assert_close(net, by_hand(sharp), TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["one closure", "mapping", "backward"])
def test_pcgrad_equals_the_loop_by_hand(way: str, engine: str) -> None:
    fabric, net = doubles(), network()
    model, optimizer = fabric.setup(net, sgd(net, gk.PCGrad(), engine=engine))
    for batch in BATCHES:

        def one(name: str, batch: tuple = batch) -> Tensor:
            loss = columns(model, batch)[name]
            if way == "backward":
                fabric.backward(loss)
            return loss

        if way == "one closure":
            optimizer.step(lambda batch=batch: columns(model, batch))
        else:
            optimizer.step({name: lambda name=name: one(name) for name in NAMES})
        assert optimizer.last_step.names == NAMES
    if way == "one closure":
        assert_close(net, by_hand(surgical), TOLERANCE)
    else:  # each closure has a forward pass of its own, which BatchNorm counts
        expected = network()
        optimizer = sgd(expected, gk.PCGrad())
        for batch in BATCHES:
            optimizer.step({n: lambda n=n, batch=batch: columns(expected, batch)[n] for n in NAMES})
        assert_close(net, expected, TOLERANCE)


@pytest.mark.parametrize("when", ["before", "after", "by itself"])
def test_an_optimizer_is_wrapped_before_or_after_it_is_set_up(when: str) -> None:
    fabric, net = doubles(), network()
    if when == "before":
        model, optimizer = fabric.setup(net, sgd(net, gk.SAM(rho=0.5)))
    elif when == "after":
        model, base = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        optimizer = gk.wrap(base, gk.SAM(rho=0.5), model=net)
    else:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(sgd(net, gk.SAM(rho=0.5)))
    for batch in BATCHES:
        optimizer.step(lambda batch=batch: error(model, batch))
    assert_close(net, by_hand(sharp), TOLERANCE)


@pytest.mark.parametrize("way", ["backward", "bare module"])
def test_bfloat16(way: str) -> None:
    def trained(set_up: bool) -> nn.Module:
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        net = network().float()
        optimizer: Any = sgd(net, gk.SAM(rho=0.5))
        model: Any = net
        if set_up:
            model, optimizer = fabric.setup(net, optimizer)
        for batch in BATCHES:

            def closure(batch: tuple = batch) -> Tensor:
                x, y = (each.float() for each in batch)
                if set_up and way == "backward":
                    optimizer.zero_grad()
                    loss = (model(x).float() - y).square().mean()
                    fabric.backward(loss)
                    return loss
                with torch.autocast("cpu", torch.bfloat16) if not set_up else fabric.autocast():
                    out = net(x)
                return (out.float() - y).square().mean()

            optimizer.step(closure)
        return net

    assert_equal(trained(set_up=True), trained(set_up=False))


def test_bfloat16_demands_fabrics_backward() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = network().float()
    model, optimizer = fabric.setup(net, sgd(net, gk.PCGrad()))
    before = copy.deepcopy(net)
    x = BATCHES[0][0].float()
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        optimizer.step(lambda: model(x).float().square().mean())
    assert_equal(net, before)


@pytest.mark.parametrize("norm", [0.05, 100.0])
def test_clipping_before_a_step_without_closure(norm: float) -> None:
    fabric, net = doubles(), network()
    model, optimizer = fabric.setup(net, sgd(net, gk.PCGrad()))
    for batch in BATCHES:
        optimizer.zero_grad()
        fabric.backward(error(model, batch))
        fabric.clip_gradients(model, optimizer, max_norm=norm)
        optimizer.step()

    def take(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        return clipped(gradient(error(net, batch), net.parameters()), norm)

    assert_close(net, by_hand(take), TOLERANCE)


def test_a_displaced_transform_needs_a_closure() -> None:
    fabric, net = doubles(), network()
    model, optimizer = fabric.setup(net, sgd(net, gk.SAM()))
    fabric.backward(error(model, BATCHES[0]))
    with pytest.raises(RuntimeError, match="pass step\\(\\) a closure"):
        optimizer.step()


# The teacher is loaded after the optimizer.
@pytest.mark.filterwarnings("ignore:the teacher of EMA is not the one that was saved")
def test_save_and_load_resume_bit_for_bit(tmp_path: Path) -> None:
    def made() -> tuple[Fabric, nn.Module, Any, dict[str, Any]]:
        fabric, net = doubles(), network()
        teacher = gk.EMA(net, decay=0.9)
        base = torch.optim.Adam(net.parameters(), lr=0.1)
        model, optimizer = fabric.setup(net, gk.wrap(base, gk.GradVac(), teacher, model=net))
        state = {"model": model, "optimizer": optimizer, "teacher": teacher.teacher}
        return fabric, net, optimizer, state

    def step(optimizer: Any, state: dict[str, Any], batch: tuple[Tensor, Tensor]) -> None:
        optimizer.step(lambda: columns(state["model"], batch))

    fabric, net, optimizer, state = made()
    step(optimizer, state, BATCHES[0])
    fabric.save(tmp_path / "checkpoint", state)
    for batch in BATCHES[1:]:
        step(optimizer, state, batch)
    fabric, other, optimizer, other_state = made()
    fabric.load(tmp_path / "checkpoint", other_state)
    for batch in BATCHES[1:]:
        step(optimizer, other_state, batch)
    assert_equal(other, net)
    assert_equal(other_state["teacher"], state["teacher"])
