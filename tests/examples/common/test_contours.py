import torch
from matplotlib.figure import Figure

from examples.common.contours import Outline, draw_contours, spread, without_specks
from examples.common.datasets import Sample


def test_an_empty_prediction_has_no_contour():
    target = torch.zeros(2, 64, 64)
    target[:, 20:40, 20:40] = 1
    axes, outlines = Figure().subplots(), (Outline("a", "red"), Outline("b", "blue"))
    for channels in (1, 3):
        axes.clear()
        sample = Sample("a.png", torch.rand(channels, 64, 64), target)
        draw_contours(axes, sample, torch.zeros(2, 64, 64), outlines)  # matplotlib would warn
        assert len(axes.collections) == 0
        draw_contours(axes, sample, sample.target, outlines)
        assert len(axes.collections) == 2


def large_regions(mask, smallest):
    """By breadth-first search: the 4-connected regions of at least so many pixels."""
    left, kept = set(map(tuple, mask.nonzero().tolist())), torch.zeros_like(mask)
    while left:
        region = [left.pop()]
        for y, x in region:  # which grows meanwhile
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            region += near
        for pixel in region if len(region) >= smallest else []:
            kept[pixel] = True
    return kept


def test_specks_are_the_small_regions_and_holes():
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        mask = torch.rand(16, 21, generator=generator) < (0.3, 0.5, 0.6, 0.7)[number % 4]
        before, smallest = mask.clone(), 1 + number % 12
        expected = ~large_regions(~large_regions(mask, smallest), smallest)
        assert torch.equal(without_specks(mask, smallest), expected)
        assert torch.equal(mask, before)


def test_shown_images_are_spread_over_the_stream():
    assert spread(2, 100) == [25, 75]
    assert spread(1, 7) == [3]
    assert spread(4, 2) == [0, 1]
