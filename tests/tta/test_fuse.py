"""The fusion of candidates beside an independent reference."""

from __future__ import annotations

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from tta.references import (
    images,
    network,
    reference_forward,
    reference_moments,
    reference_views,
    running,
)
from tta.references import source_weights as weights_of


def candidates(model, x):
    """With the source's statistics, and with 0.2 of them."""
    found, source = [], running(model)
    for share in (1.0, 0.2):

        def mixed(h, layer, share=share):
            pairs = zip(source[layer], reference_moments(h, layer), strict=True)
            return [share * there + (1 - share) * here for there, here in pairs]

        views = [
            back(torch.sigmoid(reference_forward(weights_of(model), view, mixed)))
            for view, back in reference_views(x)
        ]
        found.append(0.5 * views[0] + 0.5 * sum(views) / 6)
    return found


def test_fusion_equals_an_independent_reference() -> None:
    model = network()
    adapter = gk.tta.Fuse(model, weights=((0.0, 0.6), (1.0, 0.4)))
    for x in images(3):
        first, second = candidates(model, x)
        expected = torch.stack([second[:, 0], 0.6 * first[:, 1] + 0.4 * second[:, 1]], dim=1)
        torch.testing.assert_close(torch.sigmoid(adapter(x)), expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(first, second)


def test_a_gate_chooses_for_each_image() -> None:
    """By the size of the cup, in each image of a batch."""
    model, seen = network(), []

    def gate(p):
        seen.append(p)
        larger = (p[1, :, 1].mean((1, 2)) > p[0, :, 1].mean((1, 2))).to(p)
        weight = torch.stack([larger, 1 - larger], dim=1)
        return torch.stack([1 - weight, weight])

    batch = torch.cat([images(1)[0], 3 * images(2)[1]])
    adapter = gk.tta.Fuse(model, statistics=("source", gk.tta.Mixed(1.0)), gate=gate)
    adapter(batch)
    (p,) = seen
    assert p.shape == (2, 2, 2, 12, 16)
    assert adapter.facts["weights"].shape == (2, 2, 2)
    x = images(1)[0]
    found = torch.sigmoid(gk.tta.Fuse(model, gate=gate)(x))
    first, second = candidates(model, x)
    larger = second[0, 1].mean() > first[0, 1].mean()
    disc, cup = (second, first) if larger else (first, second)
    expected = torch.stack([disc[:, 0], cup[:, 1]], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_softmax_is_scaled_to_one() -> None:
    model = network()
    adapter = gk.tta.Fuse(
        model,
        statistics=("source", "test"),
        weights=((1.0, 0.3), (0.0, 0.7)),
        views=(),
        probabilities="softmax",
    )
    x = images(1)[0]
    first, second = (a(x).softmax(1) for a in (gk.tta.NoAdapt(model), gk.tta.PTBN(model)))
    expected = torch.stack([first[:, 0], 0.3 * first[:, 1] + 0.7 * second[:, 1]], dim=1)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(adapter(x).softmax(1), expected)


def test_it_costs_twelve_passes_and_weighs_alike_by_default() -> None:
    model, x, passes = network(), images(1)[0], []
    adapter = gk.tta.Fuse(model)
    adapter.model[0].register_forward_hook(lambda *_: passes.append(1))
    p = torch.sigmoid(adapter(x))
    assert len(passes) == 12
    torch.testing.assert_close(p, sum(candidates(model, x)) / 2)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"weights": ((0.5, 0.5), (0.5, 0.4))}, r"weights of class 1 are \[0\.5, 0\.4\]"),
        ({"weights": ((1.5,), (-0.5,))}, "weights is 1"),
        ({"weights": ((1.0,),), "gate": lambda p: p}, "both given"),
        ({"image_share": 2}, "image_share is 2"),
        ({"statistics": ()}, "no statistics"),
        ({"statistics": "source"}, r"statistics are 'source', but each candidate needs its own"),
        ({"statistics": ("source", gk.tta.DynamicStatistics())}, "without a state"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.tta.Fuse(network(), **arguments)
    for method in (gk.tta.Fuse, gk.tta.DistilledFuse):
        with as_users_run_it(), pytest.raises(ValueError, match=r"Mixed\(share=0\.8\), but each"):
            method(network(), statistics=gk.tta.Mixed(0.8))
    with pytest.raises(ValueError, match=r"pass statistics=gk\.tta\.Alternatives"):
        gk.tta.PTBN(network(), predict=gk.tta.Fusion())
    with pytest.raises(ValueError, match="2 candidates and 2 classes"):
        gk.tta.Fuse(network(), weights=((1.0,), (0.0,)))(images(1)[0])
    with pytest.raises(ValueError, match="2 candidates and 2 classes"):
        gk.tta.Fuse(network(), gate=lambda p: p.mean((2, 3, 4)))(images(1)[0])
    with pytest.raises(ValueError, match="no running statistics"):
        gk.tta.Fuse(nn.BatchNorm2d(2, track_running_stats=False))
