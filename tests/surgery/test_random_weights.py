"""Random weights."""

import pytest
import torch
from helpers import as_users_run_it, seeded

import gradkit as gk
from surgery.rule_steps import check_resumes, step_with

ROWS = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)


def test_random_weights_are_a_softmax_of_normal_numbers():
    drawn = torch.randn(3, generator=seeded(4), dtype=torch.float64)
    expected = [number.exp() / drawn.exp().sum() for number in drawn]
    direction = gk.RandomWeights(generator=seeded(4))(ROWS)
    torch.testing.assert_close(
        direction, sum(weight * row for weight, row in zip(expected, ROWS, strict=True))
    )


def test_random_weights_have_the_moments_of_their_distribution():
    rule = gk.RandomWeights(generator=seeded(0))
    gram = torch.eye(2, dtype=torch.float64)
    logits = torch.stack([rule.weights(gram).log() for _ in range(2000)])
    # The difference of two logits is that of two N(0, 1).
    difference = logits[:, 0] - logits[:, 1]
    assert abs(float(difference.mean())) < 0.1
    assert float(difference.var()) == pytest.approx(2, rel=0.1)


def test_random_weights_are_drawn_once_a_step():
    drawn = []

    class Watched(gk.RandomWeights):
        def draw(self, count):
            drawn.append(super().draw(count))
            return drawn[-1]

    direction, record = step_with(ROWS, Watched(), gk.SAM())
    assert len(drawn) == 1
    torch.testing.assert_close(direction, drawn[0].softmax(0) @ ROWS)
    torch.testing.assert_close(record.weights.double(), drawn[0].softmax(0))


def test_random_weights_repeat_with_their_seed():
    gram = torch.eye(3)
    one, other = gk.RandomWeights(), gk.RandomWeights()
    first, second = one.weights(gram), one.weights(gram)
    assert not torch.equal(first, second)
    assert torch.equal(other.weights(gram), first)
    assert first.dtype == torch.float32
    assert gk.RandomWeights().weights(torch.eye(1)).tolist() == [1.0]
    batch = gk.RandomWeights().weights(gram.expand(4, 3, 3))
    assert torch.equal(batch, first.expand(4, 3))


def test_random_weights_resume():
    check_resumes(gk.RandomWeights)


def test_random_weights_check_their_argument():
    with as_users_run_it(), pytest.raises(TypeError, match=r"pass torch\.Generator"):
        gk.RandomWeights(generator=0)
