import pytest
import torch

from examples.common import contours
from examples.common.adaptation import Stream
from examples.common.datasets import Sample
from examples.common.scores import CaseScores
from examples.fundus.figures import draw_alignment, save_predictions


def test_only_drawing_drops_specks_of_predictions(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        contours, "draw_contours", lambda axes, sample, masks, outlines: drawn.append(masks)
    )
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
