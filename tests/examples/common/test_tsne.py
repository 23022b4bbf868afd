"""t-SNE keeps groups apart that are apart, and the silhouette equals its definition."""

import pytest
import torch

from examples.common.tsne import embed, separation


def groups(gap, count=20):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2 * count, 5, generator=generator)
    points[:count] += gap
    return points, count * ["a"] + count * ["b"]


def test_distant_groups_stay_apart():
    points, labels = groups(20.0)
    plane = embed(points, seed=1)
    assert plane.shape == (40, 2)
    assert separation(plane, labels) > 0.5
    torch.testing.assert_close(embed(points, seed=1), plane)


def test_the_silhouette_by_its_definition():
    points, labels = groups(1.0, count=6)
    scaled = (points - points.mean(0)) / points.std(0, correction=0)
    distance = torch.cdist(scaled.double(), scaled.double())
    values = []
    for i, label in enumerate(labels):
        own = [j for j, other in enumerate(labels) if other == label and j != i]
        others = [j for j, other in enumerate(labels) if other != label]
        a, b = distance[i, own].mean(), distance[i, others].mean()
        values.append(float((b - a) / max(a, b)))
    assert separation(points, labels) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_too_few_points():
    with pytest.raises(ValueError, match="4 points"):
        embed(torch.zeros(4, 2))
