"""Lightning's manual optimization: several objectives, and what a checkpoint must carry."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import gradkit as gk
from gradkit.testing import bits as plain
from integrations.lightning_runs import (
    BATCHES,
    ENGINES,
    LOADER,
    WARNINGS,
    Manual,
    by_hand,
    fit,
    sam_gradient,
    sgd,
    trainer,
)
from integrations.references import (
    assert_close,
    assert_equal,
    error,
    gradient,
    move,
    network,
    pcgrad,
    sam,
)

pytestmark = WARNINGS


def losses(net: nn.Module, batch: tuple) -> dict[str, Tensor]:
    """Two objectives that conflict."""
    residual = net(batch[0]) - batch[1]
    return {"size": residual.square().mean(), "sign": -residual[:, 0].tanh().mean()}


def surgery(net: nn.Module, batch: tuple) -> list[Tensor]:
    both = losses(net, batch)
    weights = list(net.parameters())
    rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in both.values()]
    return pcgrad(*map(list, rows))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callable_that_returns_a_mapping(engine: str, tmp_path: Path) -> None:
    returned, records = [], []

    def body(module: Manual, batch: tuple) -> None:
        optimizer = module.optimizers()
        returned.append(optimizer.step(lambda: losses(module.net, batch)))
        records.append(optimizer.last_step)

    module = fit(Manual(sgd(gk.PCGrad(), gk.SAM(rho=0.5), engine=engine), body), tmp_path)

    def expected(net: nn.Module, batch: tuple) -> list[Tensor]:
        return sam(net, lambda: surgery(net, batch), rho=0.5)

    assert_close(module.net, by_hand(expected))
    first = losses(network(), BATCHES[0])
    assert records[0].names == ("size", "sign")
    assert any(record.cosine("size", "sign") < 0 for record in records)
    assert torch.allclose(records[0].losses, torch.stack([*first.values()]))
    assert torch.allclose(returned[0], sum(first.values()))
    assert module.trainer.global_step == len(BATCHES)


def test_lightning_refuses_a_mapping(tmp_path: Path) -> None:
    def body(module: Manual, batch: tuple) -> None:
        module.optimizers().step({"error": lambda: error(module.net, batch)})

    with pytest.raises(MisconfigurationException, match="the closure should be callable"):
        fit(Manual(sgd(), body), tmp_path)


def test_lightning_refuses_its_own_clipping(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="gradient clipping is not supported"):
        fit(Manual(sgd(), lambda *_: None), tmp_path, gradient_clip_val=1.0)


@pytest.mark.filterwarnings("ignore:Found 5 module.s. in eval mode")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_generator_accumulates_to_the_whole_batch(engine: str, tmp_path: Path) -> None:
    def halves(module: Manual, batch: tuple) -> None:
        def parts():
            for part in (slice(0, 2), slice(2, 4)):
                yield error(module.net, (batch[0][part], batch[1][part])) / 2

        module.optimizers().step(parts)

    module = Manual(sgd(gk.SAM(rho=0.5), engine=engine), halves)
    module.net.eval()  # BatchNorm would see halves

    expected = by_hand(lambda net, batch: sam_gradient(net.eval(), batch))
    assert_close(fit(module, tmp_path).net, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_manual_backward_inside_the_closure(engine: str, tmp_path: Path) -> None:
    def body(module: Manual, batch: tuple) -> None:
        optimizer = module.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = error(module.net, batch)
            module.manual_backward(loss)
            return loss

        with optimizer.toggle_model():
            optimizer.step(closure)

    module = fit(Manual(sgd(gk.SAM(rho=0.5), engine=engine), body), tmp_path)
    assert_close(module.net, by_hand(sam_gradient))


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_closure(engine: str, tmp_path: Path) -> None:
    """Two backward passes before one step: torch's own way of accumulating."""

    def body(module: Manual, batch: tuple) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            module.manual_backward(error(module.net, batch) / 2)
        optimizer.step()

    bare = fit(Manual(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), body), tmp_path)
    wrapped = fit(Manual(sgd(gk.PCGrad(), engine=engine), body), tmp_path)
    assert_equal(wrapped.net, bare.net)
    with pytest.raises(RuntimeError, match="pass step\\(\\) a closure"):
        fit(Manual(sgd(gk.SAM(), engine=engine), body), tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_optimizers_take_turns(engine: str, tmp_path: Path) -> None:
    def make(module: Manual):
        parts = (module.net[:2], module.net[2:])
        return [
            gk.wrap(
                torch.optim.SGD(part.parameters(), lr=0.1),
                gk.SAM(rho=0.5),
                model=module,
                engine=engine,
            )
            for part in parts
        ]

    def body(module: Manual, batch: tuple) -> None:
        for optimizer in module.optimizers():
            with optimizer.toggle_model():
                optimizer.step(lambda: error(module.net, batch))

    module = fit(Manual(make, body), tmp_path)

    def turns() -> nn.Module:
        net = network()
        for batch in BATCHES:
            for part in (net[:2], net[2:]):
                net.requires_grad_(False)
                part.requires_grad_(True)

                def take(part: nn.Module = part, batch: tuple = batch) -> list[Tensor]:
                    return gradient(error(net, batch), part.parameters())

                move(part.parameters(), -0.1, sam(net, take, rho=0.5))
        return net

    assert_close(module.net, turns())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_gradients_without_a_step(tmp_path: Path) -> None:
    seen = []

    def body(module: Manual, batch: tuple) -> None:
        optimizer = module.optimizers()
        seen.append(optimizer.gradients(lambda: losses(module.net, batch)).rows.clone())
        optimizer.step(lambda: losses(module.net, batch))

    module = fit(Manual(sgd(gk.PCGrad()), body), tmp_path)
    assert_close(module.net, by_hand(surgery))
    net = network()
    expected = gradient(losses(net, BATCHES[0])["sign"], net.parameters())
    assert torch.allclose(seen[0][1], torch.cat([part.reshape(-1) for part in expected]))


class Surgical(Manual):
    """Three objectives, so that PCGrad draws; a gated teacher; a scheduler."""

    def __init__(self) -> None:
        super().__init__(lambda module: None, lambda module, batch: None)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        def objectives() -> dict[str, Tensor]:
            both = losses(self.net, batch)
            return {**both, "third": self.net(batch[0].flip(0))[:, 1].mean()}

        self.optimizers().step(objectives)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = gk.wrap(
            torch.optim.Adam(self.net.parameters(), lr=0.05),
            gk.PCGrad(),
            gk.CosineLR("size", "sign"),
            gk.GatedEMA(self.net, self.teacher, between=("size", "sign")),
            model=self,
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Surgical()
    fit(whole, tmp_path, max_epochs=3)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Surgical(), LOADER)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Surgical()
    second = trainer(tmp_path, max_epochs=3)
    second.fit(resumed, LOADER, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert second.global_step == 3 * len(BATCHES)
    assert_equal(resumed, whole)
    ours, theirs = second.optimizers[0], whole.trainer.optimizers[0]
    assert ours.transforms[2].state == theirs.transforms[2].state
    assert ours.transforms[2].state["t"] == 3 * len(BATCHES)
    assert torch.equal(
        ours.transforms[0].generator.get_state(), theirs.transforms[0].generator.get_state()
    )
    assert not torch.equal(
        ours.transforms[0].generator.get_state(), gk.PCGrad().generator.get_state()
    )
    assert plain(ours.state_dict()) == plain(theirs.state_dict())
    assert {float(step["step"]) for step in ours.state.values()} == {3.0 * len(BATCHES)}
