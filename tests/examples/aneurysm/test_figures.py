"""What figures are made of: projections, overlays, latents, and how far centres are apart."""

import pytest
import torch
from torch import nn

from examples.aneurysm.figures import overlay, pooled_latents, project, separation
from examples.aneurysm.networks import Output


def test_projections_show_the_head_upwards():
    image = torch.zeros(1, 4, 3, 5)
    image[0, 3, 1, 2] = 9.0  # high up
    flat = project(image)
    assert flat.shape == (4, 5)
    assert flat[0, 2] == 1
    assert flat.sum() == 1


def test_aneurysms_are_drawn_over_vessels():
    label = torch.zeros(4, 3, 5, dtype=torch.long)
    label[1, :2, 1] = 1
    label[1, 2, 1] = 2
    label[2, 0, 3] = 1
    picture = overlay(torch.rand(1, 4, 3, 5), label)
    assert picture.shape == (4, 5, 3)
    red, _, blue = picture[2, 1]
    assert red > blue  # orange
    red, _, blue = picture[1, 3]
    assert red < blue
    untouched = overlay(torch.rand(1, 4, 3, 5), None)
    assert (untouched[..., 0] == untouched[..., 2]).all()


def test_latents_are_averaged_over_space():
    class Double(nn.Module):
        def forward(self, image):
            latent = torch.cat([image, 2 * image], 1)
            return Output(image, latent, image)

    patches = torch.rand(6, 1, 4, 4, 4)
    means = patches.mean((1, 2, 3, 4))
    found = pooled_latents(Double(), patches, torch.device("cpu"))
    torch.testing.assert_close(found, torch.stack([means, 2 * means], 1))


def groups(gap, count):
    points = torch.randn(2 * count, 5, generator=torch.Generator().manual_seed(0))
    points[:count] += gap
    return points, count * ["a"] + count * ["b"]


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
