"""Lightning's automatic optimization: its trainer owns the closure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradkit as gk
from integrations.lightning_runs import (
    BATCHES,
    ENGINES,
    WARNINGS,
    Regression,
    by_hand,
    fit,
    plain_gradient,
    sam_gradient,
    sgd,
)
from integrations.references import assert_close, assert_equal, error, gradient, move, network, sam

pytestmark = WARNINGS


@pytest.mark.parametrize("engine", ENGINES)
def test_sam_equals_the_loop_by_hand(engine: str, tmp_path: Path) -> None:
    module = fit(Regression(sgd(gk.SAM(rho=0.5), engine=engine)), tmp_path)
    assert_close(module.net, by_hand(sam_gradient))
    assert module.net[1].num_batches_tracked == len(BATCHES)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_chain_of_one_evaluation_equals_the_bare_optimizer(engine: str, tmp_path: Path) -> None:
    def adam(module):
        return torch.optim.Adam(module.parameters(), lr=0.1)

    bare = fit(Regression(adam), tmp_path)
    wrapped = Regression(lambda m: gk.wrap(adam(m), gk.PCGrad(), model=m, engine=engine))
    assert_equal(fit(wrapped, tmp_path).net, bare.net)
    assert wrapped.trainer.callback_metrics["error"] == bare.trainer.callback_metrics["error"]


def test_training_step_runs_once_per_evaluation(tmp_path: Path) -> None:
    """So Lightning reports and logs displaced losses too; `last_step` has the first ones."""
    module = fit(Regression(sgd(gk.SAM(rho=0.5))), tmp_path)
    assert module.calls == 2 * len(BATCHES)
    assert module.trainer.global_step == len(BATCHES)

    firsts, seconds = [], []

    def noted(net: nn.Module, batch: tuple) -> list[Tensor]:
        losses: list[Tensor] = []

        def take() -> list[Tensor]:
            losses.append(error(net, batch))
            return gradient(losses[-1], net.parameters())

        result = sam(net, take, rho=0.5)
        firsts.append(losses[0].detach())
        seconds.append(losses[1].detach())
        return result

    by_hand(noted)
    assert torch.allclose(torch.stack(module.outputs), torch.stack(seconds))
    mean = (sum(firsts) + sum(seconds)) / (2 * len(BATCHES))
    assert torch.allclose(module.trainer.callback_metrics["error"].double(), mean)
    assert torch.allclose(module.trainer.optimizers[0].last_step.losses[0], firsts[-1])


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_run_once_per_evaluation_and_find_its_gradients(engine: str, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}

    class Looking(Regression):
        def note(self, hook: str) -> None:
            grad = self.net[3].weight.grad
            seen.setdefault(hook, []).append(None if grad is None else grad.clone())

        def on_before_zero_grad(self, optimizer):
            self.note("on_before_zero_grad")

        def on_before_backward(self, loss):
            self.note("on_before_backward")

        def on_after_backward(self):
            self.note("on_after_backward")

        def on_before_optimizer_step(self, optimizer):
            self.note("on_before_optimizer_step")

    fit(Looking(sgd(gk.SAM(rho=0.5), engine=engine)), tmp_path)
    assert {hook: len(grads) for hook, grads in seen.items()} == {
        "on_before_zero_grad": 2 * len(BATCHES),
        "on_before_backward": 2 * len(BATCHES),
        "on_after_backward": 2 * len(BATCHES),
        "on_before_optimizer_step": 2 * len(BATCHES),
    }
    expected = plain_gradient(network(), BATCHES[0])[4]
    for hook in ("on_after_backward", "on_before_optimizer_step"):
        assert torch.allclose(seen[hook][0], expected)
        assert not torch.allclose(seen[hook][1], expected)  # at displaced weights


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler(interval: str, tmp_path: Path) -> None:
    rates = []

    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": interval},
            }

        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = fit(Scheduled(sgd(gk.SAM(rho=0.5))), tmp_path, max_epochs=2)
    length = 1 if interval == "step" else len(BATCHES)
    assert rates == [0.1 * 0.5 ** (k // length) for k in range(2 * len(BATCHES))]
    net = network()
    for rate, batch in zip(rates, 2 * BATCHES, strict=True):
        move(net.parameters(), -rate, sam_gradient(net, batch))
    assert_close(module.net, net)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_training_step_that_returns_none_skips_its_batch(engine: str, tmp_path: Path) -> None:
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert bool(outputs) == (batch_idx != 2)

    module = Skipping(sgd(engine=engine))
    with pytest.warns(UserWarning, match="nothing to step on: the closure produced no gradient"):
        fit(module, tmp_path)
    net = network()
    for batch in (*BATCHES[:2], *BATCHES[3:]):
        move(net.parameters(), -0.1, plain_gradient(net, batch))
    assert_close(module.net, net)
