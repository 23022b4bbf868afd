"""DeTTA beside an independent reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from tta.references import ReferenceAdam, gradients, images


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head, self.denoiser = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)

    def trunk(self, x):
        return self.norm(self.conv(x)).relu()

    def forward(self, x):
        return self.head(self.trunk(x))


def denoise(model, x):
    return model.denoiser(model.trunk(x))


def reference(weights, x, head):
    x = F.conv2d(x, weights["conv.weight"], weights["conv.bias"], padding=1)
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt() * weights["norm.weight"].view(1, -1, 1, 1)
    x = (x + weights["norm.bias"].view(1, -1, 1, 1)).relu()
    return F.conv2d(x, weights[f"{head}.weight"], weights[f"{head}.bias"])


def with_blind_spots(x, generator):
    """Pixel by pixel."""
    replaced = torch.rand(1, 12, 16, generator=generator)[0] < 0.1
    drawn = torch.randint(24, (1, 12, 16), generator=generator)[0]
    others = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if (i, j) != (0, 0)]
    noisy = x.clone()
    for i in range(12):
        for j in range(16):
            if replaced[i, j]:
                down, right = others[drawn[i, j]]
                k, n = min(max(i + down, 0), 11), min(max(j + right, 0), 15)
                noisy[0, :, i, j] = x[0, :, k, n]
    return noisy, replaced


@pytest.mark.parametrize("noise", ["blind_spots", "gaussian"])
def test_detta_equals_an_independent_reference(noise: str) -> None:
    model = Network().double().eval()
    generator = torch.Generator().manual_seed(2)
    adapter = gk.tta.DeTTA(
        model, denoise, lr=1e-2, noise=noise, generator=torch.Generator().manual_seed(2)
    )
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    adam, names = ReferenceAdam(), ["norm.weight", "norm.bias"]
    for x in images(3):
        if noise == "blind_spots":
            noisy, replaced = with_blind_spots(x, generator)
        else:
            noisy = x + 0.1 * torch.randn(x.shape, generator=generator).double()

        def loss(w, x=x):
            error = torch.sigmoid(reference(w, noisy, "denoiser")) - x
            return (
                error[:, :, replaced].abs().mean() if noise == "blind_spots" else (error**2).mean()
            )

        adam.step(weights, gradients(weights, names, loss), 1e-2)
        torch.testing.assert_close(adapter(x), reference(weights, x, "head"), rtol=1e-9, atol=1e-9)


class TwoDecoders(Network):
    """Its segmentation has a layer that the denoiser does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.head(self.last(self.trunk(x)))


def test_the_released_preset_equals_training_by_torch() -> None:
    model, target = TwoDecoders().double().eval(), torch.cat(images(6))
    adapter = gk.tta.DeTTA(
        model,
        denoise,
        noise="gaussian",
        preset="released",
        generator=torch.Generator().manual_seed(2),
    )
    reference, generator = TwoDecoders().double().train(), torch.Generator().manual_seed(2)
    trained = [*reference.norm.parameters(), *reference.last.parameters()]
    adam = torch.optim.Adam(trained, lr=1e-6, betas=(0.9, 0.99))
    for batch in target.split(2):
        adapter.adapt(batch)
        noisy = batch + 0.1 * torch.randn(batch.shape, generator=generator).double()
        features = reference.trunk(noisy)
        reference.last(features)
        adam.zero_grad()
        (torch.sigmoid(reference.denoiser(features)) - batch).square().mean().backward()
        adam.step()
    reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(target), reference(target), rtol=1e-9, atol=1e-9)
    for name, value in reference.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(adapter.model.state_dict()[name], value, rtol=1e-9, atol=0)
    before = gk.testing.bits(adapter.state_dict())
    adapter.model(target)
    assert gk.testing.bits(adapter.state_dict()) == before
    start = TwoDecoders().double().eval()
    assert not torch.allclose(adapter.model(target), start(target), rtol=1e-2)


def test_without_a_blind_spot_there_is_no_step() -> None:
    adapter = gk.tta.DeTTA(Network(), denoise, strength=1e-9)
    adapter(torch.rand(1, 3, 8, 8))
    assert not adapter.last_step.applied


def test_neighbours_are_never_the_pixel_itself() -> None:
    image = torch.arange(400.0).reshape(1, 1, 20, 20)
    noisy, replaced = gk.tta.detta.blind_spots(image, 1.0, torch.Generator().manual_seed(0))
    assert replaced.all()
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    moved = (noisy - image)[inside].flatten()
    offsets = {20.0 * i + j for i in range(-2, 3) for j in range(-2, 3)} - {0.0}
    assert set(moved.tolist()) == offsets


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="strength is 1"):
        gk.tta.DeTTA(Network(), denoise, strength=1.5)
    with as_users_run_it(), pytest.raises(ValueError, match="noise is 'salt'"):
        gk.tta.DeTTA(Network(), denoise, noise="salt")
    with as_users_run_it(), pytest.raises(ValueError, match="preset is 'paper'"):
        gk.tta.DeTTA(Network(), denoise, preset="paper")
    with pytest.raises(ValueError, match=r"shape \[1, 2, 8, 8\] for images of shape"):
        gk.tta.DeTTA(Network(), lambda model, x: model(x))(torch.rand(1, 3, 8, 8))
