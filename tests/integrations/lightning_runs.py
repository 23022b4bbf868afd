"""What the tests with Lightning share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradkit as gk
from integrations.references import data, error, gradient, move, network, sam

# Lightning 2.6 calls what torch 2.13 deprecates, and recommends worker processes to everyone.
WARNINGS = [
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

ENGINES = ["functional", "inplace"]
BATCHES = data(6)
LOADER = DataLoader(BATCHES, batch_size=None)  # of whole batches

MakeOptimizer = Callable[[nn.Module], Any]


class Regression(lightning.LightningModule):
    """Automatic optimization of one loss."""

    def __init__(self, make: MakeOptimizer) -> None:
        super().__init__()
        self.net = network()
        self.make = make
        self.calls = 0
        self.outputs: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = error(self.net, batch)
        self.log("error", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.outputs.append(outputs["loss"])

    def configure_optimizers(self):
        return self.make(self)


class Manual(lightning.LightningModule):
    """Manual optimization by a function of module and batch."""

    def __init__(self, make: MakeOptimizer, body: Callable[[Manual, tuple], Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = network()
        self.make = make
        self.body = body

    def training_step(self, batch, batch_idx):
        self.body(self, batch)

    def configure_optimizers(self):
        return self.make(self)


def sgd(*transforms: gk.Transform, **options: Any) -> MakeOptimizer:
    return lambda module: gk.wrap(
        torch.optim.SGD(module.parameters(), lr=0.1), *transforms, model=module, **options
    )


def trainer(root: Path, **options: Any) -> lightning.Trainer:
    given = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **given,
    )


def fit(module: lightning.LightningModule, root: Path, **options: Any) -> Any:
    trainer(root, **options).fit(module, LOADER)
    return module


def by_hand(take_gradient: Callable[[nn.Module, tuple], list[Tensor]]) -> nn.Module:
    net = network()
    for batch in BATCHES:
        move(net.parameters(), -0.1, take_gradient(net, batch))
    return net


def plain_gradient(net: nn.Module, batch: tuple) -> list[Tensor]:
    return gradient(error(net, batch), net.parameters())


def sam_gradient(net: nn.Module, batch: tuple) -> list[Tensor]:
    return sam(net, lambda: plain_gradient(net, batch), rho=0.5)
