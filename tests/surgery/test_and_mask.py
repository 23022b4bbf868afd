"""ANDMask and SANDMask; what holds of every elementwise rule is in test_elementwise.py."""

import math

import torch
from helpers import jacobians, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkit as gk
from surgery.columns import by_column, sign


def and_mask(column, tau):
    agreement = abs(sum(map(sign, column)))
    return sum(column) / len(column) if agreement >= tau * len(column) - 1e-9 else 0.0


def sand_mask(column, tau, k):
    count = len(column)
    mean = sum(column) / count
    excess = abs(sum(map(sign, column))) / count - tau
    if excess <= 0:
        return 0.0
    variance = sum((number - mean) ** 2 for number in column) / max(count - 1, 1)
    return mean * (math.tanh(k * excess / variance) if variance else 1.0)


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6), st.sampled_from([0.0, 0.2, 0.5, 0.6, 2 / 3, 0.8, 1.0]))
def test_the_and_mask_is_its_definition(jacobian, tau):
    expected = by_column(jacobian, lambda column: and_mask(column, tau))
    torch.testing.assert_close(gk.ANDMask(tau)(jacobian), expected)


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6), st.sampled_from([0.0, 0.2, 0.6, 0.8]), st.sampled_from([0.1, 1.0, 10.0]))
def test_the_sand_mask_is_its_definition(jacobian, tau, k):
    expected = by_column(jacobian, lambda column: sand_mask(column, tau, k))
    torch.testing.assert_close(gk.SANDMask(tau, k)(jacobian), expected)


def test_the_and_mask_is_what_the_sand_mask_tends_to():
    jacobian = 1e-4 * torch.randn(5, 200, generator=seeded(0))
    torch.testing.assert_close(gk.SANDMask(0.7)(jacobian), gk.ANDMask(0.7)(jacobian))
