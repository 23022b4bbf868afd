"""Tent beside an independent reference."""

from __future__ import annotations

import copy

import torch

import gradkit as gk
from tta.references import (
    ReferenceAdam,
    gradients,
    images,
    network,
    reference_entropy,
    reference_forward,
)


def test_tent_equals_an_independent_reference() -> None:
    model = network()
    adapter = gk.tta.TENT(model, lr=1e-2)
    weights = {name: value.detach() for name, value in copy.deepcopy(model).named_parameters()}
    names = [f"{layer}.{part}" for layer in (1, 5) for part in ("weight", "bias")]
    adam = ReferenceAdam()
    for x in images(8):
        grads = gradients(weights, names, lambda w, x=x: reference_entropy(reference_forward(w, x)))
        adam.step(weights, grads, 1e-2)
        torch.testing.assert_close(adapter(x), reference_forward(weights, x), rtol=1e-10, atol=0)
