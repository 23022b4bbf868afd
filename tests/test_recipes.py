import math

import pytest
import torch
from helpers import (
    Perceptron,
    ReferenceAdam,
    ReferenceSGD,
    batches,
    counted,
    displaced,
    dot,
    entropy,
    explicit,
    flat,
    forward,
    length,
    relative_error,
    seeded,
)
from torch import nn

import gradkit as gk

ENGINES = ["functional", "inplace"]
# Written out here rather than taken from gradkit.
FACTORS = {
    "quadratic": lambda c: (c + 1) ** 2 / 4,
    "linear": lambda c: (c + 1) / 2,
    "sigmoid": lambda c: 1 / (1 + math.exp(-c)),
    "relu": lambda c: max(0.0, c),
    "softplus": lambda c: math.log1p(math.exp(c)),
    "constant": lambda c: 1.0,
}


def pseudo(x, y, *weights):
    return (forward(x, *weights) - y).square().mean()


def auxiliary(x, *weights):
    return entropy(forward(x, *weights))


def decay(*weights):
    return 0.05 * sum(weight.square().sum() for weight in weights)


def grads(loss, weights):
    return list(torch.autograd.grad(loss, weights))


def cosine(a, b):
    return dot(a, b) / (length(a) * length(b))


def algorithm_1(x, y, weights, look_ahead=1.0):
    """Lines 1 to 4: the pseudo-gradient one auxiliary step ahead, and the cosine of both."""
    g_a = grads(auxiliary(x, *weights), weights)
    ahead = displaced(weights, -look_ahead, g_a)
    g = grads(pseudo(x, y, *ahead), ahead)
    return g, g_a, cosine(g, g_a)


def two_groups(model):
    parameters = list(model.parameters())
    return [{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:], "lr": 0.05}]


def objectives(model, x, y):
    return {
        "pseudo": lambda: pseudo(x, y, *model.parameters()),
        "auxiliary": lambda: auxiliary(x, *model.parameters()),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", [*FACTORS, "a callable"])
def test_twenty_five_steps_of_algorithm_1_with_adam(engine, activation):
    model = Perceptron()
    weights = explicit(model)
    start = flat(weights)
    reference = ReferenceAdam(weights, lr=[0.02, 0.02, 0.05, 0.05])
    if activation == "a callable":
        given, factor = (lambda c: torch.exp(c) / 2), (lambda c: math.exp(c) / 2)
    else:
        given, factor = activation, FACTORS[activation]
    optimizer = gk.GraTa(
        torch.optim.Adam(two_groups(model)), model=model, activation=given, engine=engine
    )
    cosines = []
    first = explicit(model)
    for t, (x, _) in enumerate(batches(25)):
        # By turns, towards sharper predictions, as the entropy asks, and towards flat ones.
        y = (4.0 if t % 2 else 0.0) * forward(x, *first).detach()
        optimizer.step(objectives(model, x, y))
        g, _, c = algorithm_1(x, y, weights)
        cosines.append(c)
        reference.step(g, scale=factor(c))
        record = optimizer.last_step
        assert float(record.cosine("pseudo", "auxiliary")) == pytest.approx(c, abs=1e-12)
        assert float(record.lr_scale) == pytest.approx(factor(c), abs=1e-12)
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-10
    # The run says something only if both signs occur and the weights move.
    assert min(cosines) < -0.05
    assert max(cosines) > 0.05
    assert relative_error(flat(weights), start) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("look_ahead", [0.0, 0.3])
def test_the_look_ahead_step(engine, look_ahead):
    model, (x, y) = Perceptron(), next(batches(1))
    weights = explicit(model)
    optimizer = gk.GraTa(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model=model,
        look_ahead=look_ahead,
        activation="constant",
        engine=engine,
    )
    optimizer.step(objectives(model, x, y))
    g, _, _ = algorithm_1(x, y, weights, look_ahead)
    assert relative_error(flat(model.parameters()), flat(weights) - flat(g)) < 1e-13


def test_the_recipe_is_its_chain():
    models = Perceptron(), Perceptron()
    bases = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    recipe = gk.GraTa(bases[0], model=models[0], look_ahead=0.5, activation="softplus")
    chain = gk.wrap(
        bases[1],
        gk.LookAhead(along="auxiliary", update="pseudo", step_size=0.5),
        gk.CosineLR("pseudo", "auxiliary", activation="softplus"),
        model=models[1],
    )
    for x, y in batches(3):
        recipe.step(objectives(models[0], x, y))
        chain.step(objectives(models[1], x, y))
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


# Cost.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_costs_two_backward_passes(engine):
    model, (x, y) = Perceptron(), next(batches(1))
    counts = {name: {"forward": 0, "backward": 0} for name in ("pseudo", "auxiliary", "further")}

    def watched(name, closure):
        return lambda: counted(closure(), counts[name])

    optimizer = gk.GraTa(torch.optim.Adam(model.parameters(), lr=0.01), model=model, engine=engine)
    closures = {name: watched(name, f) for name, f in objectives(model, x, y).items()}
    optimizer.step(closures)
    once = {"forward": 1, "backward": 1}
    assert counts == {"pseudo": once, "auxiliary": once, "further": {"forward": 0, "backward": 0}}
    closures["further"] = watched("further", lambda: decay(*model.parameters()))
    optimizer.step(closures)
    twice = {"forward": 2, "backward": 2}
    assert counts == {"pseudo": twice, "auxiliary": twice, "further": once}


@pytest.mark.parametrize("engine", ENGINES)
def test_one_closure_for_both_costs_two_forwards_and_two_backwards(engine):
    """Each forward computes both losses, but only the one that is asked for is differentiated."""
    model, (x, y) = Perceptron(), next(batches(1))
    counts = {name: {"forward": 0, "backward": 0} for name in ("pseudo", "auxiliary")}

    def closure():
        return {name: counted(f(), counts[name]) for name, f in objectives(model, x, y).items()}

    def step(objectives):
        optimizer = gk.GraTa(
            torch.optim.SGD(model.parameters(), lr=0.1), model=model, engine=engine
        )
        optimizer.step(objectives)
        return flat(model.parameters())

    start = {name: value.clone() for name, value in model.state_dict().items()}
    joint = step(closure)
    expected = {"forward": 2, "backward": 1}
    assert counts == {"pseudo": expected, "auxiliary": expected}
    model.load_state_dict(start)
    assert relative_error(joint, step(objectives(model, x, y))) < 1e-13


# Composition.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_further_objective_is_evaluated_at_theta(engine):
    model = Perceptron()
    weights = explicit(model)
    reference = ReferenceSGD(weights, lr=0.1, momentum=0.9)
    optimizer = gk.GraTa(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, engine=engine
    )
    for x, y in batches(5):
        # Between the two, so that the rows have to be put back in order.
        optimizer.step(
            {
                "pseudo": lambda x=x, y=y: pseudo(x, y, *model.parameters()),
                "further": lambda: decay(*model.parameters()).square(),
                "auxiliary": lambda x=x: auxiliary(x, *model.parameters()),
            }
        )
        g, _, c = algorithm_1(x, y, weights)
        further = grads(decay(*weights).square(), weights)
        total = [a + b for a, b in zip(g, further, strict=True)]
        reference.step(total, scale=FACTORS["quadratic"](c))
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-12
        record = optimizer.last_step
        assert record.names == ("pseudo", "further", "auxiliary")
        assert record.weights.tolist() == [1.0, 1.0, 0.0]
        assert float(record.cosine("pseudo", "auxiliary")) == pytest.approx(c, abs=1e-12)


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


# Errors.


def test_the_objectives_are_named():
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.GraTa(torch.optim.SGD([w], lr=0.1))
    for objectives, missing in (
        ({"pseudo": lambda: w.sum()}, "auxiliary"),
        ({"auxiliary": lambda: w.sum(), "loss": lambda: w.sum()}, "pseudo"),
        (lambda: w.sum(), "auxiliary"),
    ):
        with pytest.raises(ValueError, match=f"needs the objective '{missing}', but the step has"):
            optimizer.step(objectives)
    assert w.tolist() == [1.0, 1.0]


def test_one_objective_cannot_look_ahead_along_itself():
    with pytest.raises(ValueError, match="along and update are both 'loss'"):
        gk.LookAhead(along="loss", update="loss")


def test_points_cannot_be_joined_after_a_rule_by_tensor():
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.PCGrad(scope="tensor"), gk.LookAhead())
    with pytest.raises(ValueError, match="put the transform that displaces before that rule"):
        optimizer.step({"pseudo": lambda: w.sum(), "auxiliary": lambda: w.square().sum()})
    assert w.tolist() == [1.0, 1.0]
