"""DeYO beside an independent reference."""

from __future__ import annotations

import math

import pytest
import torch

import gradkit as gk
from tta.references import (
    AFFINE,
    ReferenceMomentum,
    binary,
    gradients,
    images,
    network,
    reference_forward,
)
from tta.references import source_weights as weights_of


def shuffled(x, generator):
    """12 by 16 pixels in 16 patches of 3 by 4."""
    order = torch.rand(1, 16, generator=generator).argsort(dim=1)[0].tolist()
    result = torch.empty_like(x)
    for place, patch in enumerate(order):
        (i, j), (k, n) = divmod(place, 4), divmod(patch, 4)
        result[:, :, 3 * i : 3 * i + 3, 4 * j : 4 * j + 4] = x[
            :, :, 3 * k : 3 * k + 3, 4 * n : 4 * n + 4
        ]
    return result


def test_deyo_equals_an_independent_reference() -> None:
    model = network()
    adapter = gk.tta.DeYO(
        model,
        lr=0.05,
        entropy_share=0.96,
        difference=0.01,
        generator=torch.Generator().manual_seed(4),
    )
    weights, optimizer = weights_of(model), ReferenceMomentum(0.05)
    generator = torch.Generator().manual_seed(4)
    for x in images(3):
        p = torch.sigmoid(reference_forward(weights, x))
        q = torch.sigmoid(reference_forward(weights, shuffled(x, generator)))
        fall = torch.where(p >= 0.5, p - q, (1 - p) - (1 - q))
        certain, falls = binary(p.logit()) < 0.96 * math.log(2), fall > 0.01
        for mask in (certain, falls):
            assert 0 < mask.sum() < mask.numel()  # so that the filters matter

        def loss(w, x=x, kept=certain & falls, fall=fall):
            h = binary(reference_forward(w, x))
            weight = (0.4 * math.log(2) - h.detach()).exp() + fall.exp()
            return (weight * h)[kept].mean()

        optimizer.step(weights, gradients(weights, AFFINE, loss))
        logits = adapter(x)
        torch.testing.assert_close(logits, reference_forward(weights, x), rtol=1e-9, atol=1e-9)
        kept = (certain & falls).double().mean().item()
        assert adapter.facts["kept"].item() == pytest.approx(kept)
    assert not torch.allclose(weights["1.weight"], model[1].weight)


def test_nothing_kept_takes_no_step() -> None:
    adapter = gk.tta.DeYO(network(), difference=1.0)
    before = {name: each.clone() for name, each in adapter.trained().items()}
    adapter(images(1)[0])
    assert not adapter.last_step.applied
    assert all(torch.equal(each, before[name]) for name, each in adapter.trained().items())


def test_a_remainder_of_the_patches_stays_where_it_is() -> None:
    x = torch.rand(2, 3, 9, 10)
    moved = gk.tta.deyo.shuffle_patches(x, 4, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, :, 8:], x[:, :, 8:])
    assert torch.equal(moved[..., 8:], x[..., 8:])
    assert not torch.equal(moved, x)
    torch.testing.assert_close(moved.sum((2, 3)), x.sum((2, 3)))


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"entropy_share": 0}, "entropy_share is 0"),
        ({"difference": 2}, "difference is 2"),
        ({"patches": 0}, "patches is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.DeYO(network(), **arguments)
    with pytest.raises(ValueError, match="cannot be cut into 4 by 4 patches"):
        gk.tta.DeYO(network())(torch.rand(1, 3, 3, 8, dtype=torch.float64))
