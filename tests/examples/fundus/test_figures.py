import pytest
import torch
from matplotlib.figure import Figure

from examples.common.adaptation import Stream
from examples.common.datasets import Sample
from examples.common.scores import CaseScores
from examples.fundus import figures
from examples.fundus.data import open_domain
from examples.fundus.figures import (
    draw_alignment,
    draw_contours,
    save_predictions,
    spread,
    without_specks,
)


def test_an_empty_prediction_has_no_contour():
    sample = open_domain("synthetic", "centre_a", "test", 64, 0, 1)[0]
    axes = Figure().subplots()
    draw_contours(axes, sample, torch.zeros(2, 64, 64))  # matplotlib would warn of no contour
    assert len(axes.collections) == 0
    draw_contours(axes, sample, sample.target)
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


def test_only_drawing_drops_specks_of_predictions(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw_contours", lambda axes, sample, masks: drawn.append(masks))
    prediction = torch.zeros(2, 64, 64, dtype=torch.bool)
    prediction[:, 20:40, 20:40] = True
    clean = prediction.clone()
    prediction[:, 3:6, 3:6] = True  # 9 pixels
    prediction[:, 30, 30] = False
    sample = Sample("a.png", torch.rand(3, 64, 64), prediction.float())
    kept = prediction.clone()
    rows = [
        ("centre_b", sample, {"none": (kept, CaseScores("a.png", {"disc": 50.0, "cup": 50.0}))})
    ]
    save_predictions(tmp_path / "figure.png", rows)
    photograph, truth, predicted = drawn
    assert photograph is None
    assert torch.equal(truth, prediction.float())
    assert torch.equal(predicted, clean.float())
    assert torch.equal(kept, prediction)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_alignment_counts_images_by_whole_numbers(count):
    stream = Stream(cosines=count * [0.5], lr_scales=count * [0.5625])
    figure = draw_alignment({"centre_b": stream})
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low < 1
        assert high > count
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks == [int(tick) for tick in ticks]
        assert len(set(ticks)) == len(ticks) >= 1
        if count == 1:
            assert ticks == [1]


def test_shown_images_are_spread_over_the_stream():
    assert spread(2, 100) == [25, 75]
    assert spread(1, 7) == [3]
    assert spread(4, 2) == [0, 1]
