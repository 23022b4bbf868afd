"""MoCo; what holds of other rules with vectors, too, is in test_vectors.py."""

import pytest
import torch
from scipy.optimize import minimize

import gradkit as gk
from surgery.vector_steps import Run, normal, positive


def projected(point):
    """The nearest point of the simplex, by a general solver."""
    found = minimize(
        lambda w: ((w - point.numpy()) ** 2).sum(),
        [1 / len(point)] * len(point),
        jac=lambda w: 2 * (w - point.numpy()),
        bounds=[(0, 1)] * len(point),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-14,
    )
    return torch.tensor(found.x)


def moco(steps, beta, gamma, rho):
    """Fernando et al.'s method, with whole matrices; the directions of all steps."""
    tracked, weights, directions = torch.zeros_like(steps[0]), None, []
    for rows in steps:
        weights = torch.full_like(rows[:, 0], 1 / len(rows)) if weights is None else weights
        tracked = tracked - beta * (tracked - rows)
        weights = projected(weights - gamma * (tracked @ (tracked.T @ weights) + rho * weights))
        directions.append(weights @ tracked)
    return directions


@pytest.mark.parametrize(
    ("count", "arguments"),
    [(2, (0.1, 0.1, 0.1)), (4, (0.5, 0.2, 0.0)), (3, (1.0, 0.01, 2.0)), (1, (0.3, 0.1, 0.1))],
)
def test_moco_is_its_definition(count, arguments):
    steps = [normal(count, seed=seed) for seed in range(8)]
    rule, run = gk.MoCo(*arguments), Run(gk.MoCo(*arguments))
    for rows, expected in zip(steps, moco(steps, *arguments), strict=True):
        torch.testing.assert_close(rule(rows), expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(run.step(rows, positive(count)), expected, rtol=1e-6, atol=1e-8)


def test_tracking_every_batch_at_once_it_is_modo():
    moco, modo = gk.MoCo(beta=1.0), gk.MoDo()
    for seed in range(5):
        rows = normal(3, seed=seed)
        torch.testing.assert_close(moco(rows), modo(rows))


def test_who_is_absent_keeps_its_gradient_and_its_share():
    run, rows, losses = Run(gk.MoCo(beta=0.5, gamma=0.05, rho=0.0)), normal(3), positive(3)
    run.step(rows, losses)
    rule = run.optimizer.transforms[0]
    before = rule.state["weights"].clone()
    run.step(rows[:2] + 1, losses[:2], "ab")
    after = rule.state["weights"]
    torch.testing.assert_close(rule.vectors["tracked.a"], rows[0] * 0.75 + 0.5)
    torch.testing.assert_close(rule.vectors["tracked.c"], rows[2] / 2)
    assert float(after[2]) == float(before[2])
    assert float(after[:2].sum()) == pytest.approx(float(before[:2].sum()))
    assert not torch.allclose(after[:2], before[:2])
    torch.testing.assert_close(
        run.optimizer.last_step.weights, (after / (1 - after[2]))[:2], check_dtype=False
    )


def test_running_means_even_out_the_noise_of_batches():
    """Weights on noisy batches come nearer to those of the true gradients than MoDo's."""
    true, noise = normal(3), torch.Generator().manual_seed(3)
    expected = gk.MGDA().weights(true @ true.T)
    tracking, plain = Run(gk.MoCo(rho=0.0, gamma=0.05)), gk.MoDo(rho=0.0, gamma=0.05)
    errors = torch.zeros(2, dtype=torch.float64)
    for step in range(300):
        rows = true + 2 * torch.randn(true.shape, generator=noise, dtype=torch.float64)
        tracking.step(rows, positive(3))
        weights = plain.weights(rows @ rows.T)
        if step >= 100:
            found = tracking.optimizer.last_step.weights
            errors += torch.stack([(w - expected).norm() for w in (found, weights)])
    assert float(errors[0]) < 0.7 * float(errors[1])
