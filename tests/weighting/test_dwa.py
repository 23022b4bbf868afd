"""DWA; what holds of every weighting is in test_loss_weighting.py."""

import math

import pytest
import torch

import gradkit as gk
from weighting.steps import CHANGING, train


@pytest.mark.parametrize("steps_per_epoch", [1, 2])
def test_dwa_counts_the_steps_in_which_an_objective_takes_part(steps_per_epoch):
    found = train(gk.DWA(steps_per_epoch=steps_per_epoch), CHANGING)
    past: dict[str, list[float]] = {}
    for step, losses in enumerate(CHANGING):
        ratios = {}
        for name in losses:
            own = past.get(name, [])
            n = steps_per_epoch
            means = [sum(own[k : k + n]) / n for k in range(0, len(own) - n + 1, n)]
            ratios[name] = means[-1] / means[-2] if len(means) >= 2 else 1.0
        total = sum(math.exp(ratio / 2) for ratio in ratios.values())
        expected = {
            name: len(losses) * math.exp(ratio / 2) / total for name, ratio in ratios.items()
        }
        assert found[step] == pytest.approx(expected, rel=1e-12)
        for name, loss in losses.items():
            past.setdefault(name, []).append(loss)


def test_dwa_goes_on_after_a_loss_of_zero():
    weighting = gk.DWA()
    found = [weighting(torch.tensor([a, 1.0])).tolist() for a in (0.0, 0.0, 0.0, 3.0, 1.5, 1.5)]
    assert found[:4] == [[1.0, 1.0]] * 4  # nothing is known of a rate of 0/0
    assert found[4] == [1.0, 1.0]  # nor of 3/0
    half = 2 / (1 + math.exp(0.25))
    assert found[5] == pytest.approx([half, 2 - half])  # 1.5/3
    tiny = gk.DWA()
    for losses in ((1e-310, 1.0), (1.0, 1.0)):
        tiny(torch.tensor(losses, dtype=torch.float64))
    assert tiny(torch.ones(2, dtype=torch.float64)).tolist() == [2.0, 0.0]
