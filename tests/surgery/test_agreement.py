"""AgrSum and AgrRand; what holds of every elementwise rule is in test_elementwise.py."""

import math

import pytest
import torch
from helpers import jacobians, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkit as gk
from surgery.columns import agree, by_column, normal_of, wide


def agr_sum(column):
    return math.fsum(column) if agree(column) else 0.0


@settings(deadline=None, max_examples=50)
@given(jacobians(1, 6))
def test_agr_sum_is_its_definition(jacobian):
    torch.testing.assert_close(gk.AgrSum()(jacobian), by_column(jacobian, agr_sum))


@settings(deadline=None, max_examples=50)
@given(wide, st.integers(0, 99))
def test_agr_rand_is_its_definition(jacobian, seed):
    rule = gk.AgrRand(generator=seeded(seed))
    normal = normal_of(rule, jacobian.shape[1])
    expected = by_column(jacobian, agr_sum)
    agreeing = [abs(agr_sum(column)) for column in jacobian.T.tolist() if agree(column)]
    scale = sum(agreeing) / len(agreeing) if agreeing else 0.0
    drawn = torch.tensor([not agree(c) and any(c) for c in jacobian.T.tolist()])
    torch.testing.assert_close(rule(jacobian), torch.where(drawn, scale * normal, expected))


def test_the_noise_is_normal():
    disagree = torch.tensor([[-1.0], [1.0]]).expand(2, 100_000)
    jacobian = torch.cat([disagree, torch.tensor([[2.0, -4.0], [2.0, -4.0]])], dim=1)
    drawn = gk.AgrRand()(jacobian)[:-2]
    assert float(drawn.mean()) == pytest.approx(0, abs=0.08)
    assert float(drawn.std()) == pytest.approx(6.0, rel=0.02)
    assert float((drawn.abs() < 6.0).double().mean()) == pytest.approx(0.6827, abs=0.01)


def test_where_nothing_agrees_there_is_no_noise():
    assert gk.AgrRand()(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [0.0, 0.0]
