"""A critic behind gradient reversal: its gradients, what it learns, and that a step leaves it."""

import pytest
import torch
from helpers import as_users_run_it, flat, seeded
from torch import nn

import gradkit as gk
from gradkit.divergence import CriticDivergence, reverse_gradient

ENGINES = ("inplace", "functional")


def test_reversal():
    x = torch.randn(3, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    assert torch.equal(reverse_gradient(x), x)
    for factor in (1.0, 0.25, 0):
        (slope,) = torch.autograd.grad(reverse_gradient(x, factor).pow(3).sum(), x)
        torch.testing.assert_close(slope, -factor * 3 * x.detach().square())
    slopes = torch.vmap(torch.func.grad(lambda each: reverse_gradient(each).square()))(x)
    torch.testing.assert_close(slopes, -2 * x)
    with as_users_run_it():
        for factor, error in (("1", TypeError), (float("nan"), ValueError)):
            with pytest.raises(error, match="factor is "):
                reverse_gradient(x, factor)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def samples(seed, shift):
    return shift + torch.randn(5, 2, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["js", "kl", "pearson"])
def test_features_descend_and_the_critic_ascends(name, normalize):
    network = small()
    critic = CriticDivergence(network, name, normalize=normalize)
    inputs = [samples(0, 0.0).requires_grad_(), samples(1, 1.0).requires_grad_()]
    divergence = gk.f_divergence(name)
    scale = divergence.curvature if normalize else 1.0
    bound = divergence.variational(*map(network, inputs)) / scale
    expected = torch.autograd.grad(bound, [*inputs, *network.parameters()])
    found = critic(*inputs)
    torch.testing.assert_close(found, bound)
    slopes = torch.autograd.grad(found, [*inputs, *critic.parameters()])
    for k, (slope, wanted) in enumerate(zip(slopes, expected, strict=True)):
        torch.testing.assert_close(slope, wanted if k < 2 else -wanted)
        assert wanted.any()


def test_descent_finds_the_divergence():
    """KL(N(1, 1) ‖ N(0, 1)) = ½, for which the best critic is 1 + ln(p/q) = x + ½."""
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    q = torch.distributions.Normal(0.0, 1.0).icdf(grid)[:, None]
    network = nn.Linear(1, 1).double()
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    critic = CriticDivergence(network, "kl")
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        critic(q + 1, q).backward()
        optimizer.step()
    assert critic(q + 1, q).item() == pytest.approx(0.5, abs=5e-3)
    assert network.weight.item() == pytest.approx(1, abs=0.05)
    assert network.bias.item() == pytest.approx(0.5, abs=0.05)


class Problem:
    """An encoder that is trained, and a critic that is not, on two domains."""

    def __init__(self, engine, critic_seed=1):
        self.encoder = nn.Linear(2, 2).double()
        torch.manual_seed(0)
        nn.init.normal_(self.encoder.weight)
        self.critic = CriticDivergence(small(critic_seed))
        base = torch.optim.SGD(self.encoder.parameters(), lr=0.1)
        self.optimizer = gk.DiM(base, self.encoder, rho=0.3, divergence_weight=2.0, engine=engine)

    def objectives(self):
        source, target = self.encoder(samples(0, 0.0)), self.encoder(samples(1, 1.0))
        self.seen.append((source.detach(), target.detach()))
        task = (source - samples(2, 0.0)).square().mean()
        return {"task": task, "divergence": self.critic(source, target)}

    def step(self):
        self.seen = []
        self.optimizer.step(self.objectives)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_leaves_the_critic_alone(engine):
    problem = Problem(engine)
    at_evaluation = []
    problem.critic.register_forward_hook(
        lambda *_: at_evaluation.append(flat(problem.critic.parameters()))
    )
    before = flat(problem.critic.parameters())
    problem.step()
    assert len(at_evaluation) == 2
    assert all(torch.equal(each, before) for each in at_evaluation)  # not displaced
    assert torch.equal(flat(problem.critic.parameters()), before)
    assert all(parameter.grad is None for parameter in problem.critic.parameters())
    assert not torch.equal(*(seen[0] for seen in problem.seen))  # the encoder is


@pytest.mark.parametrize("engine", ENGINES)
def test_the_critic_does_not_count_in_the_norm(engine):
    problem, reference = Problem(engine), Problem(engine)
    problem.step()
    weights = list(reference.encoder.parameters())
    start = [w.detach().clone() for w in weights]
    reference.seen = []

    def gradients():
        losses = reference.objectives()
        return torch.autograd.grad(losses["task"] + 2.0 * losses["divergence"], weights)

    first = gradients()
    with torch.no_grad():
        for w, g in zip(weights, first, strict=True):
            w += 0.3 * g / flat(first).norm()
    expected = [w - 0.1 * g for w, g in zip(start, gradients(), strict=True)]
    torch.testing.assert_close(flat(problem.encoder.parameters()), flat(expected))


def test_learning_in_turns_draws_the_domains_together():
    problem = Problem("inplace")
    gaps = []
    optimizer = torch.optim.Adam(problem.critic.parameters(), lr=0.05)
    for _ in range(60):
        problem.step()
        optimizer.zero_grad()
        problem.critic(*problem.seen[0]).backward()
        optimizer.step()
        source, target = problem.seen[0]
        gaps.append(float((source.mean(0) - target.mean(0)).norm()))
    assert gaps[-1] < 0.5 * gaps[0]


def test_arguments():
    with as_users_run_it(), pytest.raises(TypeError, match="network is a function; pass a torch"):
        CriticDivergence(lambda x: x)
    with pytest.raises(ValueError, match="no divergence 'w1'"):
        CriticDivergence(small(), "w1")
    assert "divergence=JS(normalize=False)" in repr(CriticDivergence(small()))
