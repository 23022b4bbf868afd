"""Vectorised calls, and views that take one of them together."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import relative_error, seeded
from torch import nn

import gradkit as gk
from gradkit.tta.objectives import logits_of_views
from gradkit.tta.statistics import install_statistics
from gradkit.tta.vectorised import vectorised
from gradkit.tta.views import WEAK_VIEWS
from tta.references import network


class Activated(nn.BatchNorm2d):
    """With a forward of its own."""

    def forward(self, x):
        return super().forward(x).tanh()


class Centred(nn.Module):
    """Mixes the images of a batch, and is no normalisation layer."""

    def forward(self, x):
        return x - x.mean(dim=0)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, own forward": lambda: Activated(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "batch, then group": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
    "batch, then centred": lambda: nn.Sequential(nn.BatchNorm2d(4), Centred()),
}
STATISTICS = {
    "source": "source",
    "test": "test",
    "mixed": gk.tta.Mixed(0.8),
    "median": gk.tta.Median(),
}


def model_with(norm: str, statistics: str) -> nn.Module:
    torch.manual_seed(0)
    layer = NORMS[norm]()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.ReLU(), nn.Conv2d(4, 2, 1))
    for name, tensor in model.double().eval().state_dict().items():
        if name.startswith("1.") and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return install_statistics(model, STATISTICS[statistics])


def squares(count: int = 1, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(1), dtype=torch.float64)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("norm", NORMS)
def test_views_together_give_what_views_one_by_one_do(norm: str, statistics: str) -> None:
    model = model_with(norm, statistics)
    for image in (squares(), squares(2), squares(2)[..., :6]):
        one_by_one = logits_of_views(model, image, WEAK_VIEWS)
        together = logits_of_views(model, image, WEAK_VIEWS, batched=True)
        for a, b in zip(together, one_by_one, strict=True):
            assert relative_error(a.detach(), b.detach()) < 1e-10


def test_one_larger_batch_would_not_do() -> None:
    model, image = model_with("batch", "test").requires_grad_(False), squares()
    views = [view.forward(image) for view in WEAK_VIEWS]
    alone = torch.cat([model(view) for view in views])
    assert relative_error(model(torch.cat(views)), alone) > 1e-3
    assert relative_error(vectorised(model, torch.stack(views)).flatten(0, 1), alone) < 1e-10


def test_a_transformer() -> None:
    torch.manual_seed(0)
    model, image = ViT().double().eval(), squares(2, 16)
    for recording in (True, False):  # without gradients it takes another kernel
        with torch.set_grad_enabled(recording):
            one_by_one = logits_of_views(model, image, WEAK_VIEWS)
            together = logits_of_views(model, image, WEAK_VIEWS, batched=True)
        assert (
            relative_error(torch.stack(together).detach(), torch.stack(one_by_one).detach()) < 1e-10
        )


def test_gradients_go_through_views_together() -> None:
    model, image = model_with("batch", "mixed"), squares(2)
    weights = list(model.parameters())
    one_by_one, together = (
        torch.autograd.grad(gk.tta.MarginalEntropy(batched_views=batched)(model, image), weights)
        for batched in (False, True)
    )
    for a, b in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


USERS = {
    "GraTa": {"lr": 1e-2},
    "MEMO": {"lr": 1e-1},
    "Fuse": {},
    "CoTTA": {},
    "DomainAdaptor": {"loss": "gem-aug"},
}


SPARED = {"GraTa": (5, 4), "MEMO": (5, 4), "Fuse": (8, 6), "DomainAdaptor": (5, 4), "CoTTA": (0, 0)}
"""Passes on square images and on others; CoTTA's views are for its teacher, a copy."""


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("side", [8, 12])
def test_adapters(name: str, side: int) -> None:
    one_by_one, together = (
        getattr(gk.tta, name)(network(), batched_views=batched, **USERS[name])
        for batched in (False, True)
    )
    passes = []
    for adapter in (one_by_one, together):
        adapter.model[7].register_forward_hook(lambda *_: passes.append(1))
    for image in squares(3, side)[..., :8].split(1):
        passes.clear()
        expected = one_by_one(image)
        before = len(passes)
        assert relative_error(together(image), expected) < 1e-10
        assert before - (len(passes) - before) == SPARED[name][side != 8]


class Branching(nn.Module):
    def forward(self, x):
        return x[:, :2] * (2.0 if float(x.sum()) > 0 else 1.0)


def test_a_model_that_cannot_be_vectorised_goes_view_by_view() -> None:
    image = squares()
    with pytest.warns(UserWarning, match=r"one by one; pass batched_views=False"):
        together = logits_of_views(Branching(), image, WEAK_VIEWS, batched=True)
    for logits in together:
        assert torch.equal(logits, 2 * image[:, :2])


def test_a_models_own_error_is_the_users() -> None:
    def broken(x):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        logits_of_views(broken, squares(), WEAK_VIEWS, batched=True)


def test_autocast_holds_for_views() -> None:
    model, image = model_with("batch", "source").float(), squares().float()
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        one_by_one = logits_of_views(model, image, WEAK_VIEWS)
        together = logits_of_views(model, image, WEAK_VIEWS, batched=True)
    assert together[0].dtype == torch.bfloat16
    for a, b in zip(together, one_by_one, strict=True):
        assert torch.equal(a, b)


def test_an_objective_of_ones_own_has_its_own_views() -> None:
    with pytest.raises(ValueError, match="which pseudo replaces; pass it to your own"):
        gk.tta.GraTa(network(), pseudo=gk.tta.entropy, batched_views=True)
