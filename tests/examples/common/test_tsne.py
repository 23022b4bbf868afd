import pytest
import torch
from PIL import Image

from examples.common.tsne import embed, save_tsne


def clusters():
    generator = torch.Generator().manual_seed(0)
    middles = 20 * torch.randn(3, 1, 5, generator=generator)
    return (middles + torch.randn(3, 15, 5, generator=generator)).flatten(0, 1)


def test_clusters_stay_apart_and_the_seed_decides():
    placed = embed(clusters(), seed=1).reshape(3, 15, 2)
    middles = placed.mean(1)
    spread = (placed - middles[:, None]).norm(dim=-1).mean()
    assert torch.pdist(middles).min() > 3 * spread
    assert torch.equal(embed(clusters(), seed=1).reshape(3, 15, 2), placed)


def test_units_of_features_do_not_matter():
    scaled = clusters() * torch.tensor([1.0, 16.0, 0.25, 4.0, 2.0])  # exact in binary
    torch.testing.assert_close(embed(scaled), embed(clusters()))


def test_three_vectors_cannot_be_placed():
    with pytest.raises(ValueError, match="there are 3 vectors to place; give at least 4"):
        embed(torch.randn(3, 4))


def test_plots_are_pictures(tmp_path):
    groups = [name for name in "abc" for _ in range(15)]
    save_tsne(tmp_path / "tsne.png", {"one": (clusters(), groups)}, "note")
    with Image.open(tmp_path / "tsne.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 20
