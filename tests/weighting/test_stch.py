"""STCH; what holds of every weighting is in test_loss_weighting.py."""

import pytest
import torch

import gradkit as gk
from weighting.steps import CHANGING, train


def test_stch_has_a_warm_up_for_each_objective():
    warmup, n = 1, 2
    found = train(gk.STCH(mu=0.5, warmup_steps=warmup, nadir_steps=n), CHANGING)
    past: dict[str, list[float]] = {}
    for step, losses in enumerate(CHANGING):
        values = {
            name: torch.tensor(loss, dtype=torch.float64, requires_grad=True)
            for name, loss in losses.items()
        }
        done = [name for name in losses if len(past.get(name, [])) >= warmup + n]
        scalar = sum(values[name].log() for name in losses if name not in done)
        if done:
            nadir = {name: sum(past[name][warmup : warmup + n]) / n for name in done}
            x = torch.stack([(values[name] / nadir[name]).log() / 0.5 for name in done])
            scalar = scalar + 0.5 * len(done) * x.logsumexp(0)
        scalar.backward()
        expected = {name: float(value.grad) for name, value in values.items()}
        assert found[step] == pytest.approx(expected, rel=1e-12)
        for name, loss in losses.items():
            past.setdefault(name, []).append(loss)


def test_a_sharp_stch_follows_the_largest_loss_alone():
    weighting = gk.STCH(mu=1e-3, warmup_steps=0, nadir_steps=1)
    weighting(torch.tensor([1.0, 1.0], dtype=torch.float64))
    weights = weighting(torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0.0, 2 / 3], abs=1e-12)


@pytest.mark.parametrize("rows", ["auto", "keep"])
def test_a_nadir_of_zero_is_named(rows):
    parameter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    base = torch.optim.SGD([parameter], lr=0.1)
    optimizer = gk.wrap(base, gk.STCH(warmup_steps=1, nadir_steps=2), rows=rows)
    for _ in range(3):
        optimizer.step(lambda: {"a": 2 * parameter, "idle": 0 * parameter})
    found = r"STCH.* divides losses by their means in the 2 steps .* of objective 'idle' is 0, so"
    with pytest.raises(gk.NonFiniteError, match=found):
        optimizer.step(lambda: {"a": 2 * parameter, "idle": 0 * parameter})
    optimizer.step(lambda: {"a": 2 * parameter})
