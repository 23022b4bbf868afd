"""What figures are made of: projections, overlays, latents, and how far centres are apart."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from examples.aneurysm.figures import (
    Shown,
    overlay,
    pooled_latents,
    project,
    save_latents,
    save_projections,
    separation,
)
from examples.aneurysm.networks import Output
from examples.common.datasets import Sample


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


def captured(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    return figures


def test_every_centre_has_points_and_a_mark_of_its_own(monkeypatch, tmp_path):
    """Nine centres, where there are seven colours."""
    figures = captured(monkeypatch)
    monkeypatch.setattr("examples.aneurysm.figures.embed", lambda features: features[:, :2])
    names = [f"centre {k}" for k in range(9)]
    features = torch.rand(18, 3, generator=torch.Generator().manual_seed(0))
    save_latents(tmp_path / "x.png", {"gsema": features}, 2 * names, "centre 8")
    (figure,) = figures
    drawn = figure.axes[0].collections
    assert len(drawn) == 9
    assert sum(len(each.get_offsets()) for each in drawn) == 18
    lines = figure.legends[0].get_lines()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *names[:8], "centre 8 (held out)",
    ]  # fmt: skip
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9
    assert lines[8].get_marker() == "x"


def test_rows_of_flat_volumes_are_low(monkeypatch, tmp_path):
    figures = captured(monkeypatch)
    for depth in (8, 2, 32):
        sample = Sample("a", torch.rand(1, depth, 8, 8), torch.zeros(2, depth, 8, 8))
        label = torch.zeros(depth, 8, 8, dtype=torch.long)
        rows = 2 * [Shown("centre_a", sample, {"none": (label, 50.0)})]
        save_projections(tmp_path / "x.png", rows)
    cube, flat, high = (figure.get_size_inches()[1] for figure in figures)
    assert flat < 0.7 * cube < cube < high
