import math

import pytest
import torch
from helpers import Observed, Perceptron, as_users_run_it, batches, linear_objectives, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkit as gk


class Reference:
    """Algorithm 1 with autograd's own gradient and torch's own Adam, vector by vector."""

    def __init__(self, count, alpha, lr):
        self.alpha = alpha
        self.weights = torch.ones(count, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.weights], lr=lr, eps=0)
        self.first = None

    def step(self, rows, losses):
        self.first = losses if self.first is None else self.first
        direction = sum(w * row for w, row in zip(self.weights.tolist(), rows, strict=True))
        norms = torch.stack([(w * row).norm() for w, row in zip(self.weights, rows, strict=True)])
        ratios = losses / self.first
        targets = (norms.mean() * (ratios / ratios.mean()) ** self.alpha).detach()
        self.adam.zero_grad()
        (norms - targets).abs().sum().backward()
        self.adam.step()
        with torch.no_grad():
            self.weights *= len(rows) / self.weights.sum()
        return direction


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 5), st.integers(0, 999), st.floats(0, 3), st.floats(1e-4, 0.1))
def test_it_is_algorithm_1(count, seed, alpha, lr):
    generator = seeded(seed)
    rule, reference = gk.GradNorm(alpha, lr), Reference(count, alpha, lr)
    for _ in range(8):
        rows = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        rows *= torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]
        losses = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
        torch.testing.assert_close(rule(rows, losses), reference.step(rows, losses))


def test_the_first_step_is_the_sum():
    rows = torch.randn(3, 4, generator=seeded(0))
    torch.testing.assert_close(gk.GradNorm()(rows, torch.ones(3)), rows.sum(0))


def test_lengths_become_equal_where_training_rates_are():
    rule = gk.GradNorm(alpha=0.0, lr=0.02)
    gram = torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64))
    for _ in range(300):
        weights = rule.weights(gram, torch.ones(3))
    lengths = weights * gram.diagonal().sqrt()
    assert float(weights.sum()) == pytest.approx(3)
    assert float(lengths.max() / lengths.min()) < 1.2


def test_an_objective_that_falls_behind_gains_weight():
    rule = gk.GradNorm()
    gram = torch.eye(2, dtype=torch.float64)
    rule.weights(gram, torch.tensor([5.0, 2.0]))
    rule.weights(gram, torch.tensor([5.0, 1.0]))
    weights = rule.weights(gram, torch.tensor([5.0, 1.0]))
    assert weights[0] > 1 > weights[1]


def test_a_weight_never_becomes_negative_and_rises_again():
    rule = gk.GradNorm(alpha=0.0, lr=0.4)
    long = torch.diag(torch.tensor([100.0, 1.0], dtype=torch.float64))
    seen = [rule.weights(long, torch.ones(2)) for _ in range(20)]
    assert min(float(weights.min()) for weights in seen) == 0
    short = torch.diag(torch.tensor([0.01, 1.0], dtype=torch.float64))
    for _ in range(200):
        weights = rule.weights(short, torch.ones(2))
    assert weights[0] > 1


@pytest.mark.parametrize("losses", [(0.0, 1.0), (-1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, -2.0)])
def test_losses_that_have_no_rate(losses):
    rule = gk.GradNorm()
    gram = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    for values in (losses, losses, (1.0, 1.0), losses):
        weights = rule.weights(gram, torch.tensor(values, dtype=torch.float64))
        assert weights.isfinite().all()
        assert float(weights.sum()) == pytest.approx(2)


def test_a_nan_is_not_forgotten():
    for spoilt in ("gram", "losses"):
        rule = gk.GradNorm()
        gram, losses = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        (gram if spoilt == "gram" else losses)[..., 0] = torch.nan
        rule.weigh_alone(gram, losses)
        assert rule.weights(torch.eye(2, dtype=torch.float64), torch.ones(2)).isnan().any()


def test_it_needs_losses():
    with pytest.raises(ValueError, match="works on losses, too; pass losses="):
        gk.GradNorm()(torch.ones(2, 3))


def train(transforms, steps=6, engine="auto", lr=0.05, resume_at=None):
    """The weights after some steps, saved and loaded on the way."""
    model = Perceptron()

    def wrapped():
        base = torch.optim.Adam(model.parameters(), lr=lr)
        return gk.wrap(base, *transforms(), model=model, engine=engine)

    optimizer = wrapped()
    for number, (x, y) in enumerate(batches(steps)):
        if number == resume_at:
            state = optimizer.state_dict()
            optimizer = wrapped()
            optimizer.load_state_dict(state)
        closures = {
            "fit": lambda x=x, y=y: (model(x) - y).square().mean(),
            "size": lambda x=x: model(x).abs().mean(),
        }
        if number >= 3:  # appears later
            closures["late"] = lambda x=x: 0.1 * model(x)[0].square().sum()
        optimizer.step(closures)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), optimizer


@pytest.mark.parametrize("engine", ["functional", "inplace"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_training_goes_on_bit_for_bit(engine, scope):
    def transforms():
        return gk.GradNorm(scope=scope), gk.SAM()

    expected, optimizer = train(transforms, engine=engine)
    assert optimizer.transforms[0].state["objectives"] == ["fit", "size", "late"]
    for resume_at in (2, 4):
        found, _ = train(transforms, engine=engine, resume_at=resume_at)
        assert torch.equal(found, expected)


def test_a_step_uses_the_weights_of_those_before_it():
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([parameter], lr=1e-9), gk.GradNorm())
    found = []
    for _ in range(3):
        optimizer.step({n: lambda r=r: (parameter * r).sum() + 1 for n, r in zip("ab", rows)})  # noqa: B905
        found.append(optimizer.last_step.weights.tolist())
    assert found[0] == [1.0, 1.0]
    assert found[1] == pytest.approx([0.975, 1.025])
    assert found[2] == pytest.approx([0.95, 1.05], abs=1e-3)


def test_an_observer_is_invisible():
    rows = torch.randn(3, 4, generator=seeded(0), dtype=torch.float64)
    results = []
    for observed, chosen in ((("b",), rows), ((), rows[[0, 2]])):
        parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = gk.wrap(
            torch.optim.SGD([parameter], lr=0.1), Observed(*observed), gk.GradNorm()
        )
        for _ in range(4):
            optimizer.step(linear_objectives([parameter], chosen, "abc" if observed else "ac"))
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


def test_weights_are_by_block():
    grams = torch.stack([torch.diag(torch.tensor([1.0, s], dtype=torch.float64)) for s in (4, 9)])
    losses = torch.tensor([1.0, 2.0])
    together, apart = gk.GradNorm(), [gk.GradNorm(), gk.GradNorm()]
    for _ in range(5):
        found = together.weights(grams, losses)
        for rule, gram, weights in zip(apart, grams, found, strict=True):
            torch.testing.assert_close(rule.weights(gram, losses), weights)
    assert not math.isclose(float(found[0, 0]), 1)


def test_arguments_are_checked():
    cases = (
        ({"alpha": -1.0}, ValueError, "alpha is -1.0; it must be at least 0"),
        ({"lr": -1.0}, ValueError, "lr is -1.0; it must be at least 0"),
        ({"lr": "1"}, TypeError, "lr is '1'"),
        ({"scope": "layer"}, ValueError, "scope is 'layer'"),
    )
    with as_users_run_it():
        for arguments, error, message in cases:
            with pytest.raises(error, match=message):
                gk.GradNorm(**arguments)
