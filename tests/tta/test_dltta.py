"""DLTTA beside an independent reference, in both presets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceAdam,
    gradients,
    images,
    network,
    reference_entropy,
    reference_forward,
    reference_moments,
)
from tta.references import source_weights as weights_of

SMALL = {
    "oct": gk.tta.DLTTAPreset(4, 2, True, 4.0, False, True, True, 1e-2),
    "classification": gk.tta.DLTTAPreset(5, 2, False, 2.0, True, False, False, 1e-2),
}


def features_of(weights, x):
    """What the last layer reads."""
    for layer, padding in (("0", 1), ("4", 1)):
        x = F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=padding)
        norm = str(int(layer) + 1)
        mean, var = (each.view(1, -1, 1, 1) for each in reference_moments(x, norm))
        scale, shift = (weights[f"{norm}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
    return x


def divergence(z, other, temperature):
    """Both Kullback-Leibler divergences between Bernoulli variables, summed over two classes."""
    p, q = torch.sigmoid(z / temperature), torch.sigmoid(other / temperature)
    one = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    two = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    return float((one + two).sum(dim=1).mean())


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_dltta_equals_an_independent_reference(kind: str, flattened: bool) -> None:
    model = network()
    adapter = gk.tta.DLTTA(model, preset=SMALL[kind], features="6" if flattened else None)
    weights, adam, memory, distances = weights_of(model), ReferenceAdam(), [], []

    def key_of(x):
        features = features_of(weights, x)
        return features.flatten() if flattened else features.mean(dim=(0, 2, 3))

    for x in images(7):
        key, z = key_of(x), reference_forward(weights, x)
        if kind == "oct":
            factor = float(len(memory))
            if len(memory) == 4:
                scored = sorted(
                    ((float(key @ k / key.norm() / k.norm()), v) for k, v in memory),
                    key=lambda pair: -pair[0],
                )[:2]
                weight = [math.exp(score / 0.2) for score, _ in scored]
                mean = sum(w * v for w, (_, v) in zip(weight, scored, strict=True)) / sum(weight)
                distances.append(divergence(z, mean, 4))
                factor = math.exp(distances[-1])
        else:
            factor = 1.0
            if len(memory) >= 2:
                scored = sorted(((float(key @ k), v) for k, v in memory), key=lambda p: -p[0])[:2]
                distances.append(divergence(z, (scored[0][1] + scored[1][1]) / 2, 2) / 2)
                factor = distances[-1]
        loss = lambda w, x=x: reference_entropy(reference_forward(w, x))  # noqa: E731
        adam.step(weights, gradients(weights, AFFINE, loss), 1e-2 * factor)
        logits = adapter(x)
        assert adapter.last_step.lr_scale.item() == pytest.approx(factor, rel=1e-9)
        torch.testing.assert_close(logits, reference_forward(weights, x), rtol=1e-8, atol=1e-8)
        memory = [*memory, (key_of(x), logits)][-(4 if kind == "oct" else 5) :]
    assert len(set(distances)) > 2
    assert adapter.facts["distance"].item() == pytest.approx(distances[-1], rel=1e-9)


def test_the_presets_are_the_authors() -> None:
    oct, classification = (gk.tta.DLTTA(network(), preset=each) for each in SMALL)
    assert (oct.predict.size, classification.predict.size) == (20, 800)
    assert oct.optimizer.param_groups[0]["lr"] == 1e-3
    assert gk.tta.DLTTA(network(), lr=0.5).optimizer.param_groups[0]["lr"] == 0.5


def test_a_batch_of_more_images_than_the_memory_keeps_the_last() -> None:
    adapter = gk.tta.DLTTA(network(), preset=SMALL["oct"])
    batch = torch.cat(images(6))
    logits = adapter(batch)
    assert torch.equal(adapter.predict.values, logits[2:])
    assert adapter.last_step.lr_scale == 0
    adapter(batch)
    assert adapter.facts["distance"].dim() == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="preset is 'mri'; choose one of oct, classification"):
        gk.tta.DLTTA(network(), preset="mri")
    with pytest.raises(ValueError, match="no module 'bottleneck'"):
        gk.tta.DLTTA(network(), features="bottleneck")
    with pytest.raises(ValueError, match="leave predict out"):
        gk.tta.DLTTA(network(), predict="before")
    adapter = gk.tta.DLTTA(network())
    adapter(images(1)[0])
    with pytest.raises(ValueError, match="must be of one size"):
        adapter(torch.rand(1, 3, 8, 8, dtype=torch.float64))
