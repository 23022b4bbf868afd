"""The choice between the adapted and the source model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkit as gk
from gradkit.tta.lower_entropy import LowerEntropy, class_weighted_entropy
from tta.references import images, network


def test_the_entropy_is_that_of_its_formula() -> None:
    z = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = 1 / (1 + (-z).exp())
    terms = -(p * p.log()).sum(dim=(2, 3)) * torch.tensor([5.0, 1.0])
    expected = terms.sum(dim=1) / p.sum(dim=(1, 2, 3))
    torch.testing.assert_close(class_weighted_entropy(z, (5, 1)), expected)
    q = z.exp() / z.exp().sum(dim=1, keepdim=True)
    terms = -(q * q.log()).sum(dim=(2, 3)) * torch.tensor([5.0, 1.0])
    expected = terms.sum(dim=1) / 20
    torch.testing.assert_close(class_weighted_entropy(z, (5, 1), "softmax"), expected)


def test_its_limits_are_finite() -> None:
    z = torch.tensor([[[[-1e4]]], [[[1e4]]], [[[-torch.inf]]], [[[torch.inf]]]])
    found = class_weighted_entropy(z)
    assert torch.isfinite(found).all()
    assert (found[[1, 3]] == 0).all()


def scaled(var: tuple[float, float]) -> nn.Sequential:
    """Its logits have the variance 1 / var with the source's statistics, and 1 with the test's."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
        model[1].running_var.copy_(torch.tensor(var))
    return model


def noise(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 2, 8, 8, generator=generator, dtype=torch.float64)


def test_each_image_gets_the_more_certain_prediction() -> None:
    choice = LowerEntropy()
    choice.source = nn.Identity()
    z = noise(6) * torch.arange(1.0, 7.0).reshape(6, 1, 1, 1)
    lower = class_weighted_entropy(z.flip(0)) < class_weighted_entropy(z)
    assert lower.any()
    assert not lower.all()
    logits = choice(lambda images: images.flip(0), z)
    for image in range(6):
        assert torch.equal(logits[image], z[5 - image] if lower[image] else z[image])
    assert torch.equal(choice.facts["adapted"], lower)


@pytest.mark.parametrize(("scale", "adapted"), [(3.0, False), (0.3, True)])
def test_the_choice_of_an_adapter(scale: float, adapted: bool) -> None:
    model, x = scaled((1.0, 1.0)), scale * noise(1)
    adapter = gk.tta.PTBN(model, predict=LowerEntropy())
    expected = (gk.tta.PTBN if adapted else gk.tta.NoAdapt)(model)(x)
    assert torch.equal(adapter(x), expected)
    assert adapter.facts["adapted"].tolist() == [adapted]
    both = [class_weighted_entropy(make(model)(x)) for make in (gk.tta.PTBN, gk.tta.NoAdapt)]
    assert torch.equal(adapter.facts["entropies"], torch.stack(both))


def test_weights_change_the_choice() -> None:
    for weights, adapted in (((1, 0), True), ((0, 1), False)):
        adapter = gk.tta.PTBN(scaled((9.0, 1 / 9)), predict=LowerEntropy(weights))
        adapter(noise(1))
        assert adapter.facts["adapted"].tolist() == [adapted]


def test_the_source_stays_the_source() -> None:
    model, x = network(), images(1)[0]
    adapter = gk.tta.TENT(model, lr=1e-1, predict=LowerEntropy())
    adapter.predict.class_weights = (0, 0)  # no entropy is lower
    for _ in range(3):
        assert torch.equal(adapter(x), gk.tta.NoAdapt(model)(x))
    assert not adapter.facts["adapted"].any()


def test_what_is_not_finite_is_not_taken() -> None:
    model, x = network(), images(1)[0]
    adapter = gk.tta.PTBN(model, predict=LowerEntropy())
    with torch.no_grad():
        adapter.model[1].weight.fill_(torch.nan)
    assert torch.equal(adapter(x), gk.tta.NoAdapt(model)(x))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="class_weights is -1"):
        LowerEntropy((1, -1))
    adapter = gk.tta.PTBN(network(), predict=LowerEntropy((1, 2, 3)))
    with pytest.raises(ValueError, match=r"has 3 weights.*each of the 2 classes"):
        adapter(images(1)[0])
