"""GradDrop; what holds of every elementwise rule is in test_elementwise.py."""

import math

import pytest
import torch
from helpers import Observed, linear_objectives, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchjd.aggregation import GradDrop as TorchjdGradDrop

import gradkit as gk
from gradkit.surgery.inputs import numbers_of
from surgery.columns import by_column, uniform_of, unusual, wide


def graddrop(column, u, leak=None, function=lambda purity: purity):
    size = sum(map(abs, column))
    if size == 0:
        return 0.0
    purity = function((1 + sum(column) / size) / 2)
    leak = [0.0] * len(column) if leak is None else leak
    return math.fsum(
        (share + (1 - share) * ((purity > u) * (number > 0) + (purity <= u) * (number < 0)))
        * number
        for share, number in zip(leak, column, strict=True)
    )


@settings(deadline=None, max_examples=50)
@given(
    wide, st.integers(0, 99), st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=6, max_size=6)
)
def test_graddrop_is_its_definition(jacobian, seed, leaks):
    count, width = jacobian.shape

    def steep(purity):
        return purity**2

    for leak in (None, leaks[:count]):
        for function in (None, steep):
            rule = gk.GradDrop(leak, function, seeded(seed))
            drawn = uniform_of(rule, width)
            expected = by_column(
                jacobian,
                lambda column, u, leak=leak, f=function: graddrop(
                    column, u, leak, f or (lambda p: p)
                ),
                drawn,
            )
            torch.testing.assert_close(rule(jacobian), expected)


def test_graddrop_equals_torchjds(monkeypatch):
    """But where all gradients are 0: theirs divides 0 by 0 there."""
    generator = seeded(0)
    for count in (1, 2, 3, 5) * 7:
        for number, jacobian in enumerate(unusual(count, generator)):
            leak = torch.rand(count, generator=generator, dtype=torch.float64)
            rule = gk.GradDrop(leak.tolist() if number % 2 else None, generator=seeded(number))
            drawn = torch.tensor(uniform_of(rule, 7), dtype=torch.float64)
            monkeypatch.setattr(torch, "rand", lambda *a, drawn=drawn, **k: drawn)
            theirs = TorchjdGradDrop(leak=leak if number % 2 else None)(jacobian)
            monkeypatch.undo()
            theirs = theirs.where((jacobian != 0).any(0), 0)
            torch.testing.assert_close(rule(jacobian), theirs)


def test_both_signs_are_kept_as_often_as_they_should_be():
    jacobian = torch.tensor([[-1.0], [3.0]]).expand(2, 100_000)
    direction = gk.GradDrop()(jacobian)
    assert set(direction.tolist()) == {-1.0, 3.0}
    assert float((direction > 0).double().mean()) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_graddrop_makes_nothing_finite_of_an_infinity(value):
    jacobian = torch.tensor([[1.0], [-2.0], [value]])
    for seed in range(8):
        assert not gk.GradDrop(generator=seeded(seed))(jacobian).isfinite().any()


def test_leaks_are_given_by_position_or_name():
    jacobian = torch.randn(2, 40, generator=seeded(0))
    by_position = gk.GradDrop([0.0, 1.0])(jacobian)
    assert torch.equal(gk.GradDrop({"1": 1.0, "0": 0.0, "2": 0.5})(jacobian), by_position)
    assert torch.equal(gk.GradDrop([1.0, 1.0])(jacobian), jacobian.sum(0))
    with pytest.raises(ValueError, match="there are 3 numbers"):
        gk.GradDrop([0.0, 1.0, 0.5])(jacobian)
    with pytest.raises(ValueError, match="there is no number for the objective '1'"):
        gk.GradDrop({"0": 1.0})(jacobian)
    assert numbers_of([0.5], ("a",), torch.empty(0)).tolist() == [0.5]


def step_with(rows, *transforms, **options):
    """The direction of one step on objectives of these gradients, and its record."""
    parameters = [nn.Parameter(torch.zeros(size, dtype=rows.dtype)) for size in (3, 1, 4, 2)]
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=1.0), *transforms, **options)
    optimizer.step(linear_objectives(parameters, rows))
    return -torch.cat([parameter.detach() for parameter in parameters]), optimizer.last_step


def normal(count, seed=0):
    return torch.randn(count, 10, generator=seeded(seed), dtype=torch.float64)


def test_leaks_are_by_name():
    rows = normal(3)
    direction, _ = step_with(rows, Observed("b"), gk.GradDrop({"c": 1.0, "a": 0.0}))
    expected, _ = step_with(rows[[0, 2]], gk.GradDrop([0.0, 1.0]))
    assert torch.equal(direction, expected)
    assert not torch.equal(direction, step_with(rows[[0, 2]], gk.GradDrop())[0])
