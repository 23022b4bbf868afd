"""VPTTA beside an independent reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradkit as gk
from tta.references import images, network, reference_forward, running
from tta.references import source_weights as weights_of


def prompted(x, prompt, low=None):
    """Frequency by frequency: the prompt's middle 3 by 3 of the shifted 12 by 16."""
    spectrum = torch.fft.fft2(x)
    factor = torch.ones(x.shape[1:], dtype=x.dtype)
    rows, columns = [(4 + i - 6) % 12 for i in range(3)], [(6 + j - 8) % 16 for j in range(3)]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            mask = torch.zeros_like(factor)
            mask[:, row, column] = 1
            factor = factor + mask * (prompt[:, i, j] - 1)[:, None, None]
            if low is not None:
                low.append(spectrum.abs()[0, :, row, column])
    return torch.fft.ifft2(spectrum * factor).real


def test_vptta_equals_an_independent_reference() -> None:
    model = network()
    adapter = gk.tta.VPTTA(model, prompt_size=3, memory=3, neighbours=2)
    weights, source, memory = weights_of(model), running(model), []
    m, v = 0.0, 0.0
    for k, x in enumerate(images(5), start=1):
        low: list[torch.Tensor] = []
        prompted(x, torch.ones(3, 3, 3).double(), low)
        key = torch.stack(low, dim=1).flatten()
        prompt = torch.ones(3, 3, 3, dtype=torch.float64)
        if len(memory) >= 2:
            scored = sorted(
                ((float(key @ other / key.norm() / other.norm()), p) for other, p in memory),
                key=lambda pair: -pair[0],
            )[:2]
            share = [math.exp(score / 0.2) for score, _ in scored]
            prompt = sum(s * p for s, (_, p) in zip(share, scored, strict=True)) / sum(share)
        momentum, gaps = 1 / (math.sqrt(k) / 5 + 1), []

        def mixed(h, layer, momentum=momentum, gaps=gaps):
            mean, var = h.mean(dim=(0, 2, 3)), h.var(dim=(0, 2, 3), correction=1)
            new = [
                momentum * here.detach() + (1 - momentum) * there
                for here, there in zip((mean, var), source[layer], strict=True)
            ]
            gaps.append((new[0] - mean).abs().mean() + (new[1].sqrt() - var.sqrt()).abs().mean())
            return new

        leaf = prompt.clone().requires_grad_()
        reference_forward(weights, prompted(x, leaf), mixed)
        (g,) = torch.autograd.grad(sum(gaps) / len(gaps), leaf)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        prompt = prompt - 0.05 * (m / (1 - 0.9**k)) / ((v / (1 - 0.99**k)).sqrt() + 1e-8)
        expected = reference_forward(weights, prompted(x, prompt), mixed)
        torch.testing.assert_close(adapter(x), expected, rtol=1e-8, atol=1e-8)
        memory = [*memory, (key, prompt)][-3:]
    assert adapter.predict.prompts.shape == (3, 3, 3, 3)
    assert len(adapter.predict.keys) == 3


def test_the_momenta_are_the_papers() -> None:
    statistics = gk.tta.WarmUp()
    assert [statistics.momentum_of(k) for k in (1, 4, 100)] == pytest.approx([5 / 6, 5 / 7, 1 / 3])


def test_a_prompt_of_ones_changes_nothing() -> None:
    model = gk.tta.vptta.Prompted(nn.Identity(), channels=3, size=5)
    for shape in ((1, 3, 8, 8), (2, 3, 9, 12)):
        x = torch.rand(shape)
        torch.testing.assert_close(model(x), x)


def test_a_constant_channel_or_image_takes_a_step() -> None:
    """A dead convolution, a black slice: their variance is 0."""
    dead = network()
    with torch.no_grad():
        dead[0].weight[:2] = 0
    for model, x in ((dead, images(1)[0]), (network(), torch.zeros(1, 3, 12, 16).double())):
        adapter = gk.tta.VPTTA(model)
        assert adapter(x).isfinite().all()
        assert adapter.last_step.applied


def test_several_steps_start_from_one_prompt() -> None:
    one, two = gk.tta.VPTTA(network()), gk.tta.VPTTA(network(), steps=2)
    x = images(1)[0]
    one(x), two(x)
    assert not torch.equal(one.trained()["prompt"], two.trained()["prompt"])
    assert two.statistics.k == 1


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"prompt_size": 0}, "prompt_size is 0"),
        ({"neighbours": 50}, "neighbours is 50"),
        ({"warm_up": 0}, "n is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.VPTTA(network(), **arguments)
    vector = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="at least 2 values a channel"):
        gk.tta.VPTTA(vector)(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="one by one"):
        gk.tta.VPTTA(network())(torch.cat(images(2)))
    with pytest.raises(ValueError, match=r"prompt has 1 channels: pass channels=3"):
        gk.tta.VPTTA(network(), channels=1)(images(1)[0])
    with pytest.raises(ValueError, match=r"12, 16\], but the prompt has a side of 13"):
        gk.tta.VPTTA(network(), prompt_size=13)(images(1)[0])
    assert gk.tta.VPTTA(network(), prompt_size=12)(images(1)[0]).shape == (1, 2, 12, 16)
