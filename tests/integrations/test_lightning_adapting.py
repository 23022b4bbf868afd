"""Adapting to the images of Lightning's test loop."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradkit as gk
from integrations.lightning_runs import WARNINGS, trainer

pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers"),
]

IMAGES = list(torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
LOADER = DataLoader(IMAGES, batch_size=None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Adapting(lightning.LightningModule):
    """Adapts to each batch; the adapter is made before the loop, or by its first hook."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.net = network()
        self.adapter = gk.tta.TENT(self.net, lr=1e-2) if early else None
        self.logits: list[Tensor] = []

    def on_test_start(self):
        self.adapter = self.adapter or gk.tta.TENT(self.net, lr=1e-2)

    def test_step(self, batch, batch_idx):
        self.logits.append(self.adapter(batch))


@pytest.mark.parametrize("early", [True, False])
def test_adapting_in_the_test_loop(early: bool, tmp_path: Path) -> None:
    module, by_hand = Adapting(early), gk.tta.TENT(network(), lr=1e-2)
    trainer(tmp_path, inference_mode=False).test(module, LOADER, verbose=False)
    for logits, images in zip(module.logits, IMAGES, strict=True):
        assert torch.equal(logits, by_hand(images))


@pytest.mark.parametrize("early", [True, False])
def test_under_inference_mode_the_error_names_the_trainers_option(
    early: bool, tmp_path: Path
) -> None:
    module = Adapting(early)
    with pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
        trainer(tmp_path).test(module, LOADER, verbose=False)
    assert module.logits == []
