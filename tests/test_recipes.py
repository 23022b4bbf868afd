"""GraTa: Algorithm 1 by hand, its chain, and its cost."""

import math

import pytest
import torch
from alignment.look_ahead import FACTORS, algorithm_1, auxiliary, decay, grads, objectives, pseudo
from helpers import (
    Perceptron,
    ReferenceAdam,
    ReferenceSGD,
    batches,
    counted,
    explicit,
    flat,
    forward,
    relative_error,
)
from torch import nn

import gradkit as gk

ENGINES = ["functional", "inplace"]


def two_groups(model):
    parameters = list(model.parameters())
    return [{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:], "lr": 0.05}]


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


def test_the_objectives_are_named():
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.GraTa(torch.optim.SGD([w], lr=0.1))
    for given, missing in (
        ({"pseudo": lambda: w.sum()}, "auxiliary"),
        ({"auxiliary": lambda: w.sum(), "loss": lambda: w.sum()}, "pseudo"),
        (lambda: w.sum(), "auxiliary"),
    ):
        with pytest.raises(ValueError, match=f"needs the objective '{missing}', but the step has"):
            optimizer.step(given)
    assert w.tolist() == [1.0, 1.0]
