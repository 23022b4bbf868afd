"""Settings of Lightning's trainer: clipping, accumulation, precision, resuming."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradkit as gk
from integrations.lightning_runs import (
    BATCHES,
    ENGINES,
    LOADER,
    WARNINGS,
    MakeOptimizer,
    Regression,
    by_hand,
    fit,
    plain_gradient,
    sam_gradient,
    sgd,
    trainer,
)
from integrations.references import (
    assert_close,
    assert_equal,
    clipped,
    error,
    gradient,
    move,
    network,
    sam,
)

pytestmark = WARNINGS


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightning_clips_each_evaluation(algorithm: str, engine: str, tmp_path: Path) -> None:
    bound = 0.05

    def each_clipped(net: nn.Module, batch: tuple) -> list[Tensor]:
        def take() -> list[Tensor]:
            gradients = plain_gradient(net, batch)
            if algorithm == "norm":
                return clipped(gradients, bound)
            return [each.clamp(-bound, bound) for each in gradients]

        return sam(net, take, rho=0.5)

    module = Regression(sgd(gk.SAM(rho=0.5), engine=engine))
    fit(module, tmp_path, gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
    assert_close(module.net, by_hand(each_clipped))


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_before_the_step_find_gradients_in_the_optimizers_groups(
    engine: str, tmp_path: Path
) -> None:
    seen = []

    class Looking(Regression):
        def on_before_optimizer_step(self, optimizer):
            parts = [
                parameter.grad for group in optimizer.param_groups for parameter in group["params"]
            ]
            seen.append([None if part is None else part.clone() for part in parts])

    module = fit(Looking(sgd(gk.SAM(rho=0.5), engine=engine)), tmp_path)
    assert len(seen) == module.calls
    expected = plain_gradient(network(), BATCHES[0])
    for ours, theirs in zip(seen[0], expected, strict=True):
        assert ours is not None
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_max_norm_clips_the_final_direction_only(engine: str, tmp_path: Path) -> None:
    module = fit(Regression(sgd(gk.SAM(rho=0.5), engine=engine, max_norm=0.05)), tmp_path)
    expected = by_hand(lambda net, batch: clipped(sam_gradient(net, batch), 0.05))
    assert_close(module.net, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transforms", [(), (gk.SAM,)], ids=["none", "SAM"])
def test_accumulation_is_right_or_refused(transforms, engine: str, tmp_path: Path) -> None:
    def whole(net: nn.Module, first: tuple, second: tuple) -> list[Tensor]:
        def take() -> list[Tensor]:
            loss = (error(net, first) + error(net, second)) / 2
            return gradient(loss, net.parameters())

        return sam(net, take, rho=0.05) if transforms else take()

    expected = network()
    for first, second in zip(BATCHES[::2], BATCHES[1::2], strict=True):
        move(expected.parameters(), -0.1, whole(expected, first, second))
    module = Regression(sgd(*(make() for make in transforms), engine=engine))
    try:
        fit(module, tmp_path, accumulate_grad_batches=2)
    except RuntimeError as refusal:
        if "generator" not in str(refusal):
            raise
        expected = network()
    for ours, theirs in zip(module.net.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_autocast_at_both_points(engine: str, tmp_path: Path) -> None:
    class Single(Regression):
        def __init__(self, make: MakeOptimizer) -> None:
            super().__init__(make)
            self.net.float()

        def training_step(self, batch, batch_idx):
            return error(self.net, [part.float() for part in batch])

    def hand(precision: torch.dtype | None) -> nn.Module:
        net = network().float()

        def take(batch: tuple) -> list[Tensor]:
            with torch.autocast("cpu", precision, enabled=precision is not None):
                loss = error(net, [part.float() for part in batch])
            return gradient(loss, net.parameters())

        for batch in BATCHES:
            move(net.parameters(), -0.1, sam(net, lambda: take(batch), rho=0.5))
        return net

    module = fit(Single(sgd(gk.SAM(rho=0.5), engine=engine)), tmp_path, precision="bf16-mixed")
    assert_close(module.net, hand(torch.bfloat16), tolerance=1e-3)
    with pytest.raises(AssertionError):
        assert_close(module.net, hand(None), tolerance=1e-3)


class Taught(Regression):
    """A mean teacher that lies in the module, so that Lightning saves and restores it."""

    def __init__(self) -> None:
        super().__init__(lambda module: None)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def configure_optimizers(self):
        base = torch.optim.Adam(self.net.parameters(), lr=0.1)
        follow = gk.EMA(self.net, self.teacher, decay=0.9, warmup=True)
        return gk.wrap(base, gk.SAM(rho=0.5), follow, model=self)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = fit(Taught(), tmp_path, max_epochs=3)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Taught(), LOADER)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Taught()
    second = trainer(tmp_path, max_epochs=3)
    second.fit(resumed, LOADER, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert second.global_step == 3 * len(BATCHES)
    assert resumed.calls == 2 * 2 * len(BATCHES)
    assert_equal(resumed, whole)
    ours, theirs = resumed.trainer.optimizers[0], whole.trainer.optimizers[0]
    assert ours.transforms[1].state == theirs.transforms[1].state == {"t": 3 * len(BATCHES)}
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
