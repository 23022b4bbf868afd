"""LookAhead, and how it composes with CosineLR, SAM and surgery."""

import pytest
import torch
from helpers import (
    Perceptron,
    ReferenceAdam,
    batches,
    displaced,
    dot,
    explicit,
    flat,
    forward,
    length,
    relative_error,
    seeded,
)
from torch import nn

import gradkit as gk
from alignment.look_ahead import FACTORS, algorithm_1, auxiliary, cosine, grads, objectives, pseudo

ENGINES = ["functional", "inplace"]


def surgery(a, b):
    """PCGrad of two lists of gradients."""
    product = dot(a, b)
    if product >= 0:
        return [x + y for x, y in zip(a, b, strict=True)]
    wa, wb = 1 - product / dot(a, a), 1 - product / dot(b, b)
    return [wa * x + wb * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
def test_look_ahead_then_pcgrad(engine):
    """The auxiliary objective is an observer: surgery is between the other two."""
    model = Perceptron()
    weights = explicit(model)
    reference = ReferenceAdam(weights, lr=0.02)
    optimizer = gk.wrap(
        torch.optim.Adam(model.parameters(), lr=0.02),
        gk.LookAhead(),
        gk.PCGrad(),
        model=model,
        engine=engine,
    )
    conflicts = 0
    for x, y in batches(10):

        def opponent(x, y, *weights):
            return (forward(x, *weights) + y).square().mean()

        optimizer.step(
            {
                "auxiliary": lambda x=x: auxiliary(x, *model.parameters()),
                "opponent": lambda x=x, y=y: opponent(x, y, *model.parameters()),
                "pseudo": lambda x=x, y=y: pseudo(x, y, *model.parameters()),
            }
        )
        g, _, _ = algorithm_1(x, y, weights)
        other = grads(opponent(x, y, *weights), weights)
        conflicts += dot(g, other) < 0
        reference.step(surgery(other, g))
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-11
    assert conflicts > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_look_ahead_then_cosine_then_sam(engine):
    """SAM around both: the ascent is along g, then the whole of Algorithm 1 at θ + ε."""
    model, rho = Perceptron(), 0.2
    weights = explicit(model)
    reference = ReferenceAdam(weights, lr=0.02)
    optimizer = gk.wrap(
        torch.optim.Adam(model.parameters(), lr=0.02),
        gk.LookAhead(),
        gk.CosineLR(),
        gk.SAM(rho=rho),
        model=model,
        engine=engine,
    )
    for x, y in batches(10):
        loss = optimizer.step(objectives(model, x, y))
        g, _, _ = algorithm_1(x, y, weights)
        first = pseudo(x, y, *displaced(weights, -1.0, grads(auxiliary(x, *weights), weights)))
        first = first + auxiliary(x, *weights)
        assert float(loss) == pytest.approx(first.item(), rel=1e-12)
        there = displaced(weights, rho / (length(g) + 1e-12), g)
        g, _, c = algorithm_1(x, y, there)
        reference.step(g, scale=FACTORS["quadratic"](c))
        assert float(optimizer.last_step.lr_scale) == pytest.approx(FACTORS["quadratic"](c))
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-11


@pytest.mark.parametrize("engine", ENGINES)
def test_sam_then_look_ahead(engine):
    """LookAhead around SAM: both gradients are SAM's, each ascending from its own point."""
    model, rho = Perceptron(), 0.2
    weights = explicit(model)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=1.0),
        gk.SAM(rho=rho),
        gk.LookAhead(step_size=0.5),
        model=model,
        engine=engine,
    )
    x, y = next(batches(1))

    def sharp(loss, at):
        g = grads(loss(*at), at)
        there = displaced(at, rho / length(g), g)
        return grads(loss(*there), there)

    g_a = sharp(lambda *w: auxiliary(x, *w), weights)
    g = sharp(lambda *w: pseudo(x, y, *w), displaced(weights, -0.5, g_a))
    optimizer.step(objectives(model, x, y))
    assert relative_error(flat(model.parameters()), flat(weights) - flat(g)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cosine_inside_look_ahead_is_taken_ahead_and_the_auxiliary_stays_an_observer(engine):
    """CosineLR asks for both gradients at every point; LookAhead still steps on one of them."""
    model, (x, y) = Perceptron(), next(batches(1))
    weights = explicit(model)
    optimizer = gk.wrap(
        torch.optim.SGD(model.parameters(), lr=1.0),
        gk.CosineLR(activation="linear"),
        gk.LookAhead(step_size=0.5),
        model=model,
        engine=engine,
    )
    ahead = displaced(weights, -0.5, grads(auxiliary(x, *weights), weights))
    g, g_a = grads(pseudo(x, y, *ahead), ahead), grads(auxiliary(x, *ahead), ahead)
    optimizer.step(objectives(model, x, y))
    assert optimizer.last_step.weights.tolist() == [1.0, 0.0]
    scale = FACTORS["linear"](cosine(g, g_a))
    assert float(optimizer.last_step.lr_scale) == pytest.approx(scale, abs=1e-12)
    assert relative_error(flat(model.parameters()), flat(weights) - scale * flat(g)) < 1e-12


def test_to_first_order_the_gradients_product_is_ascended():
    """g ≈ g_p − s·H_p·g_a, checked on a quadratic, where it is exact."""
    generator = seeded(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    hessian, slope = root @ root.T, torch.randn(4, generator=generator, dtype=torch.float64)
    w = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
    g = hessian @ w.detach() - 0.1 * hessian @ slope
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.0), gk.LookAhead(step_size=0.1))
    optimizer.step({"pseudo": lambda: w @ hessian @ w / 2, "auxiliary": lambda: slope @ w})
    torch.testing.assert_close(w.grad, g, rtol=1e-12, atol=1e-12)


def test_one_objective_cannot_look_ahead_along_itself():
    with pytest.raises(ValueError, match="along and update are both 'loss'"):
        gk.LookAhead(along="loss", update="loss")


def test_points_cannot_be_joined_after_a_rule_by_tensor():
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.PCGrad(scope="tensor"), gk.LookAhead())
    with pytest.raises(ValueError, match="put the transform that displaces before that rule"):
        optimizer.step({"pseudo": lambda: w.sum(), "auxiliary": lambda: w.square().sum()})
    assert w.tolist() == [1.0, 1.0]
