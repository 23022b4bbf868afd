"""GraTa and GS-EMA: their algorithms by hand, their chains, and their cost."""

import math

import pytest
import torch
from alignment.look_ahead import FACTORS, algorithm_1, auxiliary, decay, grads, objectives, pseudo
from helpers import (
    Perceptron,
    ReferenceAdam,
    ReferenceSGD,
    as_users_run_it,
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


# GS-EMA.


def supervised_losses(model, x, y):
    """Two domains and a further objective, from one forward pass each."""
    error = (model(x) - y).square()
    return {
        "source": error[:3].mean(),
        "target": error[3:].mean() - 0.1 * model(x).mean(),
        "contrast": 0.3 * model(x).square().mean(),
    }


def test_gsema_is_its_chain():
    models = Perceptron(), Perceptron()
    bases = [torch.optim.Adam(model.parameters(), lr=0.05) for model in models]
    recipe = gk.GSEMA(bases[0], models[0], measure="cosine", decay_conflict=None, max_norm=1.0)
    gated = gk.GatedEMA(models[1], measure="cosine", decay_conflict=None)
    chain = gk.wrap(bases[1], gated, model=models[1], max_norm=1.0)
    gates = []
    for x, y in batches(6):
        recipe.step(lambda x=x, y=y: supervised_losses(models[0], x, y))
        chain.step(lambda x=x, y=y: supervised_losses(models[1], x, y))
        gates.append(float(recipe.last_step.gate))
    assert recipe.model is models[0]
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))
    teacher = recipe.transforms[0].teacher
    assert torch.equal(flat(teacher.parameters()), flat(gated.teacher.parameters()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert gates


def test_all_objectives_of_gsema_add_up():
    model = Perceptron()
    weights = explicit(model)
    optimizer = gk.GSEMA(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for x, y in batches(4):
        optimizer.step(lambda x=x, y=y: supervised_losses(model, x, y))
        own = supervised_losses(lambda x: forward(x, *weights), x, y)
        g = grads(sum(own.values()), weights)
        weights = [(w - 0.1 * v).detach().requires_grad_() for w, v in zip(weights, g, strict=True)]
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("measure", ["sign_cosine", "cosine"])
def test_the_gate_of_gsema_takes_no_pass_of_its_own(engine, measure):
    """One backward pass of each objective and one forward, as without a gate."""
    model, (x, y) = Perceptron(), next(batches(1))
    counts = {name: {"forward": 0, "backward": 0} for name in ("source", "target", "contrast")}
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def closure():
        out = model(x)
        losses = supervised_losses(lambda _: out, x, y)
        return {name: counted(loss, counts[name]) for name, loss in losses.items()}

    optimizer = gk.GSEMA(
        torch.optim.SGD(model.parameters(), lr=0.1), model, measure=measure, engine=engine
    )
    for _ in range(3):
        optimizer.step(closure)
    assert counts == {name: {"forward": 3, "backward": 3} for name in counts}
    assert len(forwards) == 3
    assert optimizer.last_step.gate is not None


def test_the_three_teachers_of_gsema():
    """A frozen copy, a module of its own start, and one that the base trains, too."""
    x, y = next(batches(1))
    model, own = Perceptron(), Perceptron(seed=7)
    start = flat(own.parameters())
    optimizer = gk.GSEMA(torch.optim.SGD(model.parameters(), lr=0.1), model, own, warmup=False)
    assert optimizer.transforms[0].teacher is own
    optimizer.step(lambda: supervised_losses(model, x, y))
    decay = float(optimizer.last_step.decay)
    expected = decay * start + (1 - decay) * flat(model.parameters())
    assert relative_error(flat(own.parameters()), expected) < 1e-14

    model, reference = Perceptron(), Perceptron()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.GSEMA(base, model, supervised=True, warmup=False)
    teacher = optimizer.transforms[0].teacher
    assert list(optimizer.model) == ["student", "teacher"]
    student, followed = explicit(reference), explicit(reference)
    for x, y in batches(5):

        def closure(x=x, y=y):
            taught = {"taught": 0.5 * (teacher(x) - y).square().mean()}
            return {**supervised_losses(model, x, y), **taught}

        optimizer.step(closure)
        own = supervised_losses(lambda x: forward(x, *student), x, y)
        g = grads(sum(own.values()), student)
        taught = grads(0.5 * (forward(x, *followed) - y).square().mean(), followed)
        rate = 0.1
        student = [(w - rate * v).detach() for w, v in zip(student, g, strict=True)]
        followed = [(w - rate * v).detach() for w, v in zip(followed, taught, strict=True)]
        decay = float(optimizer.last_step.decay)
        followed = [decay * t + (1 - decay) * s for t, s in zip(followed, student, strict=True)]
        student, followed = ([w.requires_grad_() for w in ws] for ws in (student, followed))
        assert relative_error(flat(model.parameters()), flat(student)) < 1e-12
        assert relative_error(flat(teacher.parameters()), flat(followed)) < 1e-12
    assert len(base.param_groups) == 2


def test_a_supervised_teacher_is_not_added_twice_and_its_frozen_weights_stay_so():
    model, own = Perceptron(), Perceptron(seed=3)
    model.b1.requires_grad_(False)
    own.b1.requires_grad_(False)
    base = torch.optim.SGD([*model.parameters(), own.w1], lr=0.1)
    gk.GSEMA(base, model, own, supervised=True)
    held = [id(parameter) for group in base.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == 7
    assert id(own.b1) not in held
    assert not own.b1.requires_grad


def test_arguments_of_gsema_are_checked():
    model = Perceptron()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with as_users_run_it(), pytest.raises(TypeError, match="supervised is 1; pass True"):
        gk.GSEMA(base, model, supervised=1)
    with as_users_run_it(), pytest.raises(ValueError, match="measure is 'angle'"):
        gk.GSEMA(base, model, measure="angle", supervised=True)
    with pytest.raises(TypeError, match="rho"):
        gk.GSEMA(base, model, rho=0.1, supervised=True)
    assert len(base.param_groups) == 1
    optimizer = gk.GSEMA(base, model)
    with pytest.raises(ValueError, match="GatedEMA needs the objective 'source'"):
        optimizer.step({"target": lambda: model.w1.sum()})


@pytest.mark.parametrize(
    ("make", "names"),
    [(gk.GraTa, ("pseudo", "auxiliary")), (gk.GSEMA, ("source", "target"))],
    ids=["GraTa", "GSEMA"],
)
def test_they_keep_the_optimizer_contract(make, names):
    def wrapped(model):
        return make(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model)

    with as_users_run_it():
        gk.testing.check_optimizer_contract(wrapped, names)
