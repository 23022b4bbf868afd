"""MedBN beside an independent reference."""

from __future__ import annotations

import torch

import gradkit as gk
from tta.references import images, network, reference_forward
from tta.references import source_weights as weights_of


def medians(x, layer):
    """By sorting: of 192 values the 96th."""
    values = x.transpose(0, 1).reshape(x.shape[1], -1).sort(dim=1).values
    median = values[:, (values.shape[1] - 1) // 2]
    return median, ((values - median[:, None]) ** 2).sum(dim=1) / values.shape[1]


def test_medbn_equals_an_independent_reference() -> None:
    model = network()
    adapter = gk.tta.MedBN(model)
    for x in images(3):
        expected = reference_forward(weights_of(model), x, medians)
        torch.testing.assert_close(adapter(x), expected, rtol=1e-10, atol=1e-10)
    assert adapter.last_step is None


def test_the_median_is_the_lower_and_the_variance_is_about_it() -> None:
    layer = gk.tta.install_statistics(torch.nn.BatchNorm1d(1), gk.tta.Median())
    x = torch.tensor([[[9.0, 0.0]], [[5.0, 1.0]]])
    assert layer.statistics.moments(layer, x) == (torch.tensor([1.0]), torch.tensor([20.25]))


def test_other_methods_train_with_medians() -> None:
    adapter = gk.tta.TENT(network(), lr=1e-2, statistics=gk.tta.Median())
    first = adapter(images(1)[0])
    assert not torch.allclose(first, gk.tta.MedBN(network())(images(1)[0]))
    assert torch.isfinite(first).all()
