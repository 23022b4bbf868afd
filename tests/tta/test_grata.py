"""GraTa beside an independent reference, and its cost."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import gradkit as gk
from tta.references import (
    ReferenceAdam,
    gradients,
    images,
    network,
    reference_entropy,
    reference_forward,
    reference_views,
)


def test_grata_equals_an_independent_reference() -> None:
    model = network()
    adapter = gk.tta.GraTa(model, lr=1e-2, generator=torch.Generator().manual_seed(3))
    weights = {name: value.clone() for name, value in model.named_parameters()}
    weights = {name: value.detach() for name, value in weights.items()}
    names = [f"{layer}.{part}" for layer in (1, 5) for part in ("weight", "bias")]
    adam, generator = ReferenceAdam(), torch.Generator().manual_seed(3)
    augment = gk.tta.StrongAugmentation()
    for x in images(8):
        original = x.clone()
        logits = adapter(x)
        assert torch.equal(x, original)

        auxiliary = gradients(weights, names, lambda w: reference_entropy(reference_forward(w, x)))
        ahead = {name: weights[name] - auxiliary.get(name, 0) for name in weights}
        q = (
            sum(
                back(torch.sigmoid(reference_forward(ahead, view)))
                for view, back in reference_views(x)
            )
            / 6
        )
        strong = augment(x, generator)
        strong = (strong - strong.min()) / (strong.max() - strong.min())
        pseudo = gradients(
            ahead,
            names,
            lambda w: F.binary_cross_entropy(torch.sigmoid(reference_forward(w, strong)), q),
        )
        dot = sum((pseudo[name] * auxiliary[name]).sum() for name in names)
        lengths = [
            math.sqrt(sum(float((g[name] ** 2).sum()) for name in names))
            for g in (pseudo, auxiliary)
        ]
        cosine = float(dot) / (lengths[0] * lengths[1])
        adam.step(weights, pseudo, 1e-2 * (1 + cosine) ** 2 / 4)

        assert adapter.last_step.cosine("pseudo", "auxiliary").item() == pytest.approx(cosine)
        torch.testing.assert_close(logits, reference_forward(weights, x), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(weights["1.weight"], model[1].weight)


@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_grata_costs_nine_forwards_and_two_backwards(engine: str) -> None:
    adapter = gk.tta.GraTa(network(), engine=engine)
    forwards, backwards = 0, 0

    def forward(*_):
        nonlocal forwards
        forwards += 1

    def backward(*_):
        nonlocal backwards
        backwards += 1

    adapter.model[0].register_forward_hook(forward)
    adapter.model[7].register_full_backward_hook(backward)
    adapter(images(1)[0])
    assert (forwards, backwards) == (9, 2)
