"""MoDo."""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as jd

import gradkit as gk
from surgery.rule_steps import series


@pytest.mark.parametrize("rho", [0.0, 0.1, 2.0])
def test_modo_follows_torchjds(rho):
    ours, theirs = gk.MoDo(gamma=0.05, rho=rho), jd.MoDoWeighting(gamma=0.05, rho=rho)
    for matrix in series(4):
        gram = matrix @ matrix.T
        torch.testing.assert_close(ours.weights(gram), theirs(gram))


def test_modo_takes_the_product_of_two_batches():
    ours, theirs = gk.MoDo(), jd.MoDoWeighting()
    for first, second in zip(series(3, seed=1), series(3, seed=2), strict=True):
        product = first @ second.T
        torch.testing.assert_close(ours.weights(product), theirs(product))


def test_modo_arrives_at_mgdas_weights():
    rule = gk.MoDo(gamma=0.01, rho=0.0)
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    for _ in range(200):
        weights = rule.weights(gram)
    assert weights.tolist() == pytest.approx([0.6, 0.4])
