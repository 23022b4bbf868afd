import math

import pytest
import torch
from helpers import (
    Perceptron,
    ReferenceAdam,
    ReferenceSGD,
    batches,
    displaced,
    explicit,
    flat,
    forward,
    length,
    linear_objectives,
    relative_error,
    seeded,
)
from pytorch_optimizer import SAM as TheirSAM  # noqa: N811 # not ours
from torch import nn

import gradkit as gk

ENGINES = ["functional", "inplace"]


def wrapped(model, base, *transforms, engine):
    return gk.wrap(base, *transforms, model=model, engine=engine)


def losses(x, y, *weights):
    """Two objectives that pull against each other."""
    output = forward(x, *weights)
    return {"a": (output - y).square().mean(), "b": (output + 2 * y).pow(4).mean().sqrt()}


def gradients_of(loss, weights):
    return list(torch.autograd.grad(loss, weights))


# Against references written by hand.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", ["SGD with momentum", "Adam"])
def test_twenty_steps_equal_a_reference(engine, base):
    model, rho = Perceptron(), 0.1
    weights = explicit(model)
    if base == "Adam":
        reference = ReferenceAdam(weights, lr=0.02)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    else:
        reference = ReferenceSGD(weights, lr=0.05, momentum=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = wrapped(model, optimizer, gk.SAM(rho=rho), engine=engine)
    start = flat(weights)
    for x, y in batches(20):
        loss = optimizer.step(lambda x=x, y=y: (model(x) - y).square().mean())
        here = (forward(x, *weights) - y).square().mean()
        g = gradients_of(here, weights)
        there = displaced(weights, rho / (length(g) + 1e-12), g)
        reference.step(gradients_of((forward(x, *there) - y).square().mean(), there))
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-12
        assert float(loss) == pytest.approx(here.item(), rel=1e-12)
    assert relative_error(flat(weights), start) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_one_step_equals_pytorch_optimizers(engine):
    """In float32, to 1e-6: their norm is summed in another order."""
    x, y = (tensor.float() for tensor in next(batches(1)))
    model, other = Perceptron().float(), Perceptron().float()
    ours = wrapped(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(rho=0.5), engine=engine
    )
    theirs = TheirSAM(other.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = flat(model.parameters())

    def closure():
        theirs.zero_grad()
        loss = (other(x) - y).square().mean()
        loss.backward()
        return loss

    closure()
    theirs.step(closure)
    ours.step(lambda: (model(x) - y).square().mean())
    moved, expected = flat(model.parameters()) - before, flat(other.parameters()) - before
    assert relative_error(moved, expected) < 1e-5
    assert relative_error(flat(model.parameters()), flat(other.parameters())) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_no_radius_is_the_bare_optimizer(engine):
    models = Perceptron(), Perceptron()
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    sharp = wrapped(models[0], optimizers[0], gk.SAM(rho=0.0), engine=engine)
    for x, y in batches(5):
        sharp.step(lambda x=x, y=y: (models[0](x) - y).square().mean())
        optimizers[1].zero_grad()
        (models[1](x) - y).square().mean().backward()
        optimizers[1].step()
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_quadratic_in_closed_form(engine):
    model = nn.ParameterList([torch.tensor([3.0, 4.0], dtype=torch.float64)])
    optimizer = wrapped(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(rho=0.5), engine=engine
    )
    curvature = torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer.step(lambda: (curvature * model[0].square()).sum() / 2)
    g = curvature * torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = expected - 0.1 * curvature * (expected + 0.5 * g / math.sqrt(73))
    torch.testing.assert_close(model[0].data, expected, rtol=1e-14, atol=0)


def test_a_zero_gradient_displaces_by_nothing():
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.SAM(rho=0.5))
    optimizer.step(lambda: w.square().sum())
    assert w.tolist() == [0.0, 0.0, 0.0]


def test_the_radius_is_checked():
    for rho in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"rho is {rho}; the ascent radius must be at least"):
            gk.SAM(rho=rho)


# With other transforms.


def pcgrad(first, second):
    """Of two lists of gradients, by vectors."""
    a, b = flat(first), flat(second)
    product = torch.dot(a, b)
    if product < 0:
        a, b = a - product / torch.dot(b, b) * b, b - product / torch.dot(a, a) * a
    total, parts, start = a + b, [], 0
    for gradient in first:
        parts.append(total[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()
    return parts


def both(x, y, weights):
    values = losses(x, y, *weights)
    return [torch.autograd.grad(v, weights, retain_graph=True) for v in values.values()]


def pcgrad_then_sam(x, y, weights, rho):
    """SAM around PCGrad: one ascent along the combined direction, both gradients taken there."""
    d = pcgrad(*both(x, y, weights))
    return pcgrad(*both(x, y, displaced(weights, rho / (length(d) + 1e-12), d)))


def sam_then_pcgrad(x, y, weights, rho):
    """PCGrad around SAM: the ascent is along the sum, the surgery on the gradients there."""
    d = [a + b for a, b in zip(*both(x, y, weights), strict=True)]
    return pcgrad(*both(x, y, displaced(weights, rho / (length(d) + 1e-12), d)))


@pytest.mark.parametrize("engine", ENGINES)
def test_both_orders_of_pcgrad_and_sam_equal_their_compositions(engine):
    rho, results = 0.2, []
    chains = {
        (gk.PCGrad(), gk.SAM(rho=rho)): pcgrad_then_sam,
        (gk.SAM(rho=rho), gk.PCGrad()): sam_then_pcgrad,
    }
    conflicts = 0
    for chain, compose in chains.items():
        model = Perceptron()
        weights = explicit(model)
        reference = ReferenceAdam(weights, lr=0.02)
        optimizer = wrapped(
            model, torch.optim.Adam(model.parameters(), lr=0.02), *chain, engine=engine
        )
        for x, y in batches(10):
            optimizer.step(lambda m=model, x=x, y=y: losses(x, y, *m.parameters()))
            conflicts += int(optimizer.last_step.cosine("a", "b") < 0)
            reference.step(compose(x, y, weights, rho))
            assert relative_error(flat(model.parameters()), flat(weights)) < 1e-12
        results.append(flat(weights))
    assert conflicts > 4
    assert relative_error(results[0], results[1]) > 1e-4


def test_the_norm_is_that_of_the_direction_where_gradients_cancel():
    """wᵀGw would lose every digit here; the radius is still ρ."""
    w = nn.Parameter(torch.zeros(2))
    rows = torch.tensor([[1e4, 1e-3], [-1e4, 0.0]])
    points = []
    objectives = linear_objectives([w], rows)

    def watched(closure):
        def body():
            points.append(w.detach().clone())
            return closure()

        return body

    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.0), gk.SAM(rho=0.5))
    optimizer.step({name: watched(closure) for name, closure in objectives.items()})
    assert points[0].tolist() == [0.0, 0.0]
    assert points[-1].tolist() == pytest.approx([0.0, 0.5], rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_sam_in_sam_displaces_from_the_displaced_point(engine):
    model, (x, y) = Perceptron(), next(batches(1))
    weights = explicit(model)
    optimizer = wrapped(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        gk.SAM(rho=0.1),
        gk.SAM(rho=0.3),
        engine=engine,
    )

    def inner(at):
        """The inner SAM's gradient at the weights `at`."""
        g = gradients_of((forward(x, *at) - y).square().mean(), at)
        there = displaced(at, 0.1 / length(g), g)
        return gradients_of((forward(x, *there) - y).square().mean(), there)

    d = inner(weights)
    expected = flat(weights) - flat(inner(displaced(weights, 0.3 / length(d), d)))
    optimizer.step(lambda: (model(x) - y).square().mean())
    assert relative_error(flat(model.parameters()), expected) < 1e-12


# Statistics.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_running_statistics_are_those_of_one_plain_forward(engine, momentum):
    def network():
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1)]
        model = nn.Sequential(*layers).double()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=seeded(number)))
        return model

    torch.manual_seed(0)
    model = network()
    plain = network()
    optimizer = wrapped(
        model, torch.optim.SGD(model.parameters(), lr=0.1), gk.SAM(rho=2.0), engine=engine
    )
    for x, _ in batches(3):
        plain.load_state_dict(model.state_dict())
        plain(x)
        optimizer.step(lambda x=x: model(x).square().mean())
        assert int(model[1].num_batches_tracked) == int(plain[1].num_batches_tracked)
        for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    assert int(model[1].num_batches_tracked) == 3
