"""TrimmedMean; what holds of every elementwise rule is in test_elementwise.py."""

import math

import torch
from helpers import jacobians, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import TrimmedMean as TorchjdTrimmedMean

import gradkit as gk
from surgery.columns import by_column, unusual


def trimmed_mean(column, trim):
    trim = min(trim, (len(column) - 1) // 2)
    kept = sorted(column)[trim : len(column) - trim]
    return math.fsum(kept) / len(kept)


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6), st.integers(0, 4))
def test_the_trimmed_mean_is_its_definition(jacobian, trim):
    expected = by_column(jacobian, lambda column: trimmed_mean(column, trim))
    torch.testing.assert_close(gk.TrimmedMean(trim)(jacobian), expected)


def test_the_trimmed_mean_equals_torchjds():
    generator = seeded(0)
    for count in (1, 2, 3, 5, 8) * 6:
        for jacobian in unusual(count, generator):
            for trim in range((count + 1) // 2):
                theirs = TorchjdTrimmedMean(trim)(jacobian)
                torch.testing.assert_close(gk.TrimmedMean(trim)(jacobian), theirs)


def test_the_trimmed_mean_of_too_few_is_the_median():
    jacobian = torch.randn(5, 20, generator=seeded(0))
    assert torch.equal(gk.TrimmedMean(9)(jacobian), jacobian.median(0).values)
    torch.testing.assert_close(gk.TrimmedMean(1)(jacobian[:2]), jacobian[:2].mean(0))


def test_the_trimmed_mean_survives_an_infinite_objective():
    jacobian = torch.randn(4, 5, generator=seeded(0))
    jacobian[2] = torch.inf
    expected = jacobian[[0, 1, 3]].sort(0).values[1:].mean(0)
    torch.testing.assert_close(gk.TrimmedMean()(jacobian), expected)
