"""The weight of the divergence: constant, rising, and 0."""

import math

import pytest
import torch
from helpers import as_users_run_it
from torch import nn

import gradkit as gk
from gradkit.divergence import DivergenceWeight


def optimizer_for(weight: DivergenceWeight, **options):
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    return w, gk.wrap(torch.optim.SGD([w], lr=1.0), weight, **options)


def losses(w):
    return {"task": w[0] + 0, "divergence": 2 * w.sum(), "further": 3 * w[0]}


@pytest.mark.parametrize("rows", ["auto", "keep"])
def test_the_ramp_counts_applied_steps(rows):
    w, optimizer = optimizer_for(DivergenceWeight(0.5, ramp=4), rows=rows, nonfinite="skip")
    expected = [0.5 * math.exp(-5 * (1 - min(t, 4) / 4) ** 2) for t in range(6)]
    for t, value in enumerate(expected):
        if t == 2:  # a step that is not applied does not count
            optimizer.step(lambda: {**losses(w), "task": w[0] * math.nan})
            assert not optimizer.last_step.applied
        optimizer.step(lambda: losses(w))
        torch.testing.assert_close(w.grad, torch.tensor([4 + 2 * value, 2 * value]).double())
    assert expected[4] == expected[5] == 0.5


@pytest.mark.parametrize("rows", ["auto", "keep"])
def test_a_weight_of_0_records_only(rows):
    w, optimizer = optimizer_for(DivergenceWeight(0), rows=rows)
    w2 = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer.add_param_group({"params": [w2]})
    optimizer.step(lambda: {**losses(w), "divergence": w2.sum()})
    assert optimizer.last_step.losses.tolist() == [0.0, 1.0, 0.0]
    assert w.grad.tolist() == [4.0, 0.0]
    assert w2.grad is None  # the base skips it, as it would without the divergence


def test_both_objectives_are_needed():
    w, optimizer = optimizer_for(DivergenceWeight())
    for given, missing in (
        (lambda: w.sum(), "task"),
        (lambda: {"task": w.sum(), "loss": w.sum()}, "divergence"),
        ({"divergence": lambda: w.sum()}, "task"),
    ):
        with pytest.raises(ValueError, match=f"needs the objective '{missing}', but the step has"):
            optimizer.step(given)
    assert w.tolist() == [0.0, 0.0]


def test_arguments():
    with as_users_run_it():
        for arguments, error, message in (
            ({"weight": -0.1}, ValueError, "weight is -0.1; it must be at least 0"),
            ({"weight": "0.1"}, TypeError, "weight is '0.1'; pass a number"),
            ({"ramp": 0}, ValueError, "ramp is 0; it must be at least 1"),
            ({"ramp": 10.0}, TypeError, "ramp is 10.0; pass a whole number"),
        ):
            with pytest.raises(error, match=message):
                DivergenceWeight(**arguments)
