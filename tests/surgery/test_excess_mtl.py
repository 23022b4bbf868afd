"""ExcessMTL; what holds of DB-MTL, too, is in test_vectors.py."""

import pytest
import torch
from helpers import seeded
from torchjd.aggregation import ExcessMTL as TorchjdExcessMTL

import gradkit as gk
from surgery.vector_steps import Run, normal, positive


def structured(seed):
    jacobian = normal(3, seed=seed)
    kind = seed % 4
    if kind == 1:
        jacobian[2] = -jacobian[0]
    elif kind == 2:
        jacobian[1] = 0
    elif kind == 3:
        jacobian[0] *= 100
    return jacobian


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("step_size", [0.3, 1.0])
def test_excess_mtl_equals_torchjds(warmup, step_size):
    for run in range(5):
        ours, theirs = gk.ExcessMTL(step_size, warmup), TorchjdExcessMTL(step_size, warmup)
        for step in range(10):
            # Theirs loses a weight for good as soon as it underflows.
            jacobian = structured(10 * run + step) if run else normal(3, seed=step)
            torch.testing.assert_close(ours(jacobian), theirs(jacobian), rtol=1e-9, atol=1e-12)


def excess_weights(steps, eta, warmup):
    """He et al.'s weights, number by number."""
    count, width = steps[0].shape
    squares = [[0.0] * width for _ in range(count)]
    first, weights, gathered = None, [1 / count] * count, [0.0] * count
    for number, rows in enumerate(steps):
        excess = []
        for i, row in enumerate(rows.tolist()):
            squares[i] = [s + g * g for s, g in zip(squares[i], row, strict=True)]
            excess.append(
                sum(g * g / (s + 1e-7) ** 0.5 for s, g in zip(squares[i], row, strict=True))
            )
        if number < warmup:
            gathered = [a + e / warmup for a, e in zip(gathered, excess, strict=True)]
        else:
            if first is None and warmup == 0:
                first, relative = excess, excess
            else:
                first = gathered if first is None else first
                relative = [e / (f + 1e-7) for e, f in zip(excess, first, strict=True)]
            grown = [
                w * torch.tensor(eta * r, dtype=torch.float64).exp().item()
                for w, r in zip(weights, relative, strict=True)
            ]
            weights = [w / sum(grown) for w in grown]
        yield weights


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_excess_mtl_is_its_definition(warmup, count):
    steps = [normal(count, seed=k) for k in range(6)]
    rule = gk.ExcessMTL(0.7, warmup)
    for rows, weights in zip(steps, excess_weights(steps, 0.7, warmup), strict=True):
        expected = sum(w * row for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(rule(rows), expected)


def test_excess_mtl_begins_with_equal_weights_however_many_numbers_there_are():
    """The authors' first step; from e itself one weight would be nearly 1 at once."""
    rows = torch.randn(3, 5000, generator=seeded(0), dtype=torch.float64)
    rows = rows * torch.tensor([[1.0], [1.5], [0.5]], dtype=torch.float64)
    rule = gk.ExcessMTL()
    torch.testing.assert_close(rule(rows), rows.mean(0))
    second = torch.linalg.lstsq(rows.T, rule(rows)[:, None]).solution
    assert second.flatten().tolist() == pytest.approx([1 / 3] * 3, rel=0.05)


def test_a_weight_of_excess_mtl_comes_back():
    """Logarithms do not underflow."""
    rule = gk.ExcessMTL(n_warmup_steps=1)
    rows = torch.eye(2, dtype=torch.float64)
    rule(rows)
    rule(rows * torch.tensor([[1.0], [1e7]]))
    assert rule(rows).tolist()[0] == pytest.approx(0, abs=1e-300)
    rule(rows * torch.tensor([[1e9], [1.0]]))
    assert rule(rows).tolist()[0] == pytest.approx(1)


def test_an_objective_that_appears_later():
    run = Run(gk.ExcessMTL(n_warmup_steps=2))
    for seed in range(4):
        run.step(normal(2, seed=seed), positive(2))
    for seed in range(4, 8):
        run.step(normal(3, seed=seed), positive(3))
        weights = run.optimizer.last_step.weights
        assert float(weights.sum()) == pytest.approx(1)
        if seed < 6:
            assert float(weights[2]) == pytest.approx(1 / 3)
    assert float(weights[2]) != pytest.approx(1 / 3)
