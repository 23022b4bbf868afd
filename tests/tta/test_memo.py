"""MEMO beside an independent reference."""

from __future__ import annotations

import pytest
import torch

import gradkit as gk
from tta.references import (
    gradients,
    images,
    network,
    reference_forward,
    reference_moments,
    reference_views,
    running,
)
from tta.references import source_weights as weights_of


def test_memo_equals_an_independent_reference() -> None:
    model = network()
    adapter, source, statistics = gk.tta.MEMO(model, lr=0.5), weights_of(model), running(model)

    def mixed(x, layer):
        pairs = zip(statistics[layer], reference_moments(x, layer), strict=True)
        return [16 / 17 * there + 1 / 17 * here for there, here in pairs]

    def loss(weights, x):
        views = [
            back(torch.sigmoid(reference_forward(weights, view, mixed)))
            for view, back in reference_views(x)
        ]
        p = sum(views) / 6
        return -(p * p.log() + (1 - p) * (1 - p).log()).mean()

    for x in images(3):  # anew each time
        g = gradients(source, list(source), lambda w: loss(w, x))
        weights = {name: source[name] - 0.5 * g[name] for name in source}
        expected = reference_forward(weights, x, mixed)
        torch.testing.assert_close(adapter(x), expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(expected, reference_forward(source, x, mixed))


def test_a_classifiers_views_are_not_mapped_back() -> None:
    z = torch.tensor([[1.0, 0.0, -1.0]])
    objective = gk.tta.MarginalEntropy()
    calls = iter([z, -z, z, -z, z, -z])
    p = (z.softmax(1) + (-z).softmax(1)) / 2
    loss = objective(lambda x: next(calls), torch.rand(1, 3, 4, 4))
    assert loss.item() == pytest.approx(float(-(p * p.log()).sum()), rel=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="views is empty"):
        gk.tta.MEMO(network(), views=())
    with pytest.raises(ValueError, match="have no two axes"):
        gk.tta.MEMO(torch.nn.BatchNorm1d(3))(torch.rand(2, 3, 5))
