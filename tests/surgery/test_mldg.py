import math
from collections import Counter

import pytest
import torch
from helpers import (
    Perceptron,
    ReferenceAdam,
    Weighted,
    as_users_run_it,
    counted,
    displaced,
    dot,
    explicit,
    flat,
    length,
    relative_error,
    seeded,
)
from torch import nn

import gradkit as gk
from surgery.domains import (
    ENGINES,
    FORMS,
    NAMES,
    Asks,
    Displaced,
    Observers,
    add,
    closures,
    domain,
    domains,
    grads,
    one_step,
    scaled,
    times,
    total,
)

SPLIT = [15, 5, 20, 4]


def mldg(losses, test, weights, alpha, beta):
    """Algorithm 1 to first order: the direction, and the meta-test gradient."""
    train = [grads(loss, weights) for name, loss in losses.items() if name != test]
    mean = scaled(total(train), 1 / len(train))
    g = grads(losses[test], add(weights, mean, -alpha))
    return add(mean, g, beta), g


def draws(seed):
    """The meta-test domains: each step's first in a permutation of all."""
    generator = seeded(seed)
    while True:
        yield NAMES[int(torch.randperm(3, generator=generator)[0])]


# Against references written by hand.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_equal_algorithm_1(engine, form):
    model, alpha, beta = Perceptron(), 0.1, 0.7
    weights = explicit(model)
    reference = ReferenceAdam(weights, lr=0.02)
    optimizer = gk.wrap(
        torch.optim.Adam(model.parameters(), lr=0.02),
        gk.MLDG(alpha=alpha, beta=beta, generator=seeded(2)),
        model=model,
        engine=engine,
    )
    drawn, start, seen = draws(2), flat(weights), set()
    for t in range(10):
        optimizer.step(closures(model, domains(t), form))
        test = next(drawn)
        seen.add(test)
        reference.step(mldg(domains(t), test, weights, alpha, beta)[0])
        record = optimizer.last_step
        assert record.names == NAMES
        expected = [beta if name == test else 0.5 for name in NAMES]
        assert record.weights.tolist() == pytest.approx(expected)
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-10
    assert seen == set(NAMES)
    assert relative_error(flat(weights), start) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("test", NAMES)
def test_a_named_domain_is_always_the_test(engine, form, test):
    transform = gk.MLDG(alpha=0.1, beta=0.5, test=test)
    before = transform.generator.get_state()
    direction, _, start = one_step(transform, engine=engine, form=form)
    expected, _ = mldg(domains(), test, start, 0.1, 0.5)
    assert relative_error(direction, flat(expected)) < 1e-12
    assert torch.equal(transform.generator.get_state(), before)


def test_two_domains():
    losses = {"a": domain(0), "b": domain(1)}
    direction, record, start = one_step(gk.MLDG(alpha=0.1, test="b"), losses=losses)
    a = grads(losses["a"], start)
    expected = add(a, grads(losses["b"], add(start, a, -0.1)))
    assert relative_error(direction, flat(expected)) < 1e-12
    assert record.weights.tolist() == [1.0, 1.0]


def test_every_domain_is_drawn():
    """How often is a matter of the order, which is Fish's, too."""
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.0), gk.MLDG(beta=7.0))
    counts = Counter()
    for _ in range(20):
        optimizer.step({name: lambda: w.sum() for name in NAMES})
        counts[optimizer.last_step.weights.tolist().index(7.0)] += 1
    assert sorted(counts) == [0, 1, 2]


def test_it_asks_that_the_step_helps_the_test_domain():
    """On quadratics d = ∇[L_i + β·(L_j − α·⟨g_i, g_j⟩)] less the half that holds H_i."""
    generator = seeded(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    hessian, slope = root @ root.T, torch.randn(4, generator=generator, dtype=torch.float64)
    w = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
    expected = slope + 0.5 * (hessian @ w.detach() - 0.1 * hessian @ slope)
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.0), gk.MLDG(alpha=0.1, beta=0.5, test="b"))
    optimizer.step({"a": lambda: slope @ w, "b": lambda: w @ hessian @ w / 2})
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-12)


# Composition.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(6))
def test_an_observer_is_never_drawn_and_stays_where_it_is(form, seed):
    transforms = Observers("b"), gk.MLDG(alpha=0.1, beta=0.5, generator=seeded(seed))
    direction, record, start = one_step(*transforms, form=form)
    order = [NAMES[k] for k in torch.randperm(3, generator=seeded(seed)).tolist()]
    test = next(name for name in order if name != "b")
    losses = {name: loss for name, loss in domains().items() if name != "b"}
    expected, g = mldg(losses, test, start, 0.1, 0.5)
    assert relative_error(direction, flat(expected)) < 1e-12
    assert float(record.weights[1]) == 0.0
    own = grads(domain(1), start)
    assert float(record.gram[1, 1]) == pytest.approx(dot(own, own), rel=1e-12)
    k = NAMES.index(test)
    assert float(record.gram[k, 1]) == pytest.approx(dot(g, own), rel=1e-12)


def test_the_seeds_above_draw_an_observer_first():
    firsts = {NAMES[int(torch.randperm(3, generator=seeded(seed))[0])] for seed in range(6)}
    assert firsts == set(NAMES)


@pytest.mark.parametrize("engine", ENGINES)
def test_given_weights_are_those_of_weighted_losses(engine):
    factors = {"a": 2.0, "b": 0.5, "c": -1.5}
    transforms = Weighted(**factors), gk.MLDG(alpha=0.1, beta=0.5, test="c")
    direction, record, start = one_step(*transforms, engine=engine)
    losses = {name: times(loss, factors[name]) for name, loss in domains().items()}
    expected, _ = mldg(losses, "c", start, 0.1, 0.5)
    assert relative_error(direction, flat(expected)) < 1e-12
    assert record.weights.tolist() == [1.0, 0.25, -0.75]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_sam_around_it_keeps_the_test_domain_at_the_displaced_point(engine, form):
    transforms = gk.MLDG(alpha=0.1, generator=seeded(3)), gk.SAM(rho=0.3)
    direction, _, start = one_step(*transforms, engine=engine, form=form)
    test = next(draws(3))
    d, _ = mldg(domains(), test, start, 0.1, 1.0)
    expected, _ = mldg(domains(), test, displaced(start, 0.3 / length(d), d), 0.1, 1.0)
    assert relative_error(direction, flat(expected)) < 1e-12


def test_surgery_after_it_is_between_its_rows():
    losses = {"a": domain(0), "b": times(domain(0), -0.5)}
    transforms = gk.MLDG(alpha=0.1, beta=0.5, test="b"), gk.PCGrad()
    direction, _, start = one_step(*transforms, losses=losses)
    a = grads(losses["a"], start)
    b = scaled(mldg(losses, "b", start, 0.1, 0.5)[1], 0.5)
    assert dot(a, b) < 0
    wa, wb = 1 - dot(a, b) / dot(a, a), 1 - dot(a, b) / dot(b, b)
    assert relative_error(direction, flat(add(scaled(a, wa), b, wb))) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_only_and_at_are_honoured(form):
    shift = 0.1 * torch.randn(44, generator=seeded(0), dtype=torch.float64)
    transforms = gk.MLDG(0.1, generator=seeded(2)), Asks("a", "c"), Displaced(shift)
    direction, record, start = one_step(*transforms, form=form)
    parts = [p.view(w.shape) for p, w in zip(shift.split(SPLIT), start, strict=True)]
    order = [NAMES[k] for k in torch.randperm(3, generator=seeded(2)).tolist()]
    test = next(name for name in order if name != "b")
    losses = {name: domains()[name] for name in "ac"}
    expected, _ = mldg(losses, test, add(start, parts), 0.1, 1.0)
    assert record.names == ("a", "c")
    assert relative_error(direction, flat(expected)) < 1e-12


def test_where_the_test_domain_is_not_asked_for_the_others_mean_remains():
    direction, record, start = one_step(gk.MLDG(0.1, test="c"), Asks("a", "b"))
    expected = add(grads(domain(0), start), grads(domain(1), start))
    assert record.names == ("a", "b")
    assert relative_error(direction, 0.5 * flat(expected)) < 1e-12


def test_a_learning_rate_scaled_inside_is_that_at_the_inner_step():
    transforms = gk.CosineLR("a", "b", activation="linear"), gk.MLDG(0.1, test="c")
    _, record, start = one_step(*transforms)
    a, b = grads(domain(0), start), grads(domain(1), start)
    there = add(start, add(a, b), -0.05)
    a, b = grads(domain(0), there), grads(domain(1), there)
    cosine = dot(a, b) / (length(a) * length(b))
    assert float(record.lr_scale) == pytest.approx((1 + cosine) / 2, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_the_cost_is_one_gradient_of_each(engine, form):
    model = Perceptron()
    counts = {name: {"forward": 0, "backward": 0} for name in NAMES}
    losses = {
        name: lambda *weights, f=f, name=name: counted(f(*weights), counts[name])
        for name, f in domains().items()
    }
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.MLDG(), model=model, engine=engine)
    optimizer.step(closures(model, losses, form))
    forwards = 1 if form == "one by one" else 2
    assert counts == {name: {"forward": forwards, "backward": 1} for name in NAMES}


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_see_each_domain_once(engine):
    def network():
        model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.1), nn.Linear(3, 1)).double()
        with torch.no_grad():
            model[1].weight.copy_(torch.ones(1, 3))
        return model

    # Statistics of the inputs themselves depend on no weights, but on the order of the domains.
    inputs = torch.randn(3, 6, 3, generator=seeded(5), dtype=torch.float64)
    model, plain = network(), network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.MLDG(0.2, test="1"), gk.SAM(rho=0.5), model=model, engine=engine)
    optimizer.step({f"{k}": lambda x=x: model(x).square().mean() for k, x in enumerate(inputs)})
    for k in (0, 2, 1):
        plain(inputs[k])
    assert int(model[0].num_batches_tracked) == 3
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# State, contract and errors.


def test_the_draws_go_on_where_a_checkpoint_was_taken():
    def run(steps, start=None):
        model = Perceptron()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = gk.wrap(base, gk.MLDG(0.1), model=model)
        if start is not None:
            model.load_state_dict(start[0])
            optimizer.load_state_dict(start[1])
        for t in steps:
            optimizer.step(closures(model, domains(t)))
        return model.state_dict(), optimizer.state_dict()

    whole, resumed = run(range(6)), run(range(3, 6), run(range(3)))
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())
    assert str(whole[1]["param_groups"]) == str(resumed[1]["param_groups"])


def test_the_contract():
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), gk.MLDG(0.1), model=model
        ),
        ("a", "b", "c"),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("test", [None, "a"])
def test_it_needs_two_objectives(form, test):
    with pytest.raises(ValueError, match="tests on another, so it needs two of nonzero weight"):
        one_step(gk.MLDG(test=test), losses={"a": domain(0)}, form=form)
    losses = {"a": domain(0), "b": domain(1)}
    with pytest.raises(ValueError, match="tests on another, so it needs two of nonzero weight"):
        one_step(Observers("b"), gk.MLDG(test=test), losses=losses, form=form)


def test_a_single_unnamed_loss_is_not_enough():
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.MLDG())
    with pytest.raises(ValueError, match="it needs two of nonzero weight among 'loss'"):
        optimizer.step(lambda: w.sum())
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match="it needs two of nonzero weight among 'loss'"):
        optimizer.step()
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("form", FORMS)
def test_the_test_domain_must_be_there_and_have_a_weight(form):
    with pytest.raises(ValueError, match="MLDG needs the objective 'd', but the step has 'a', 'b'"):
        one_step(gk.MLDG(test="d"), form=form)
    with pytest.raises(ValueError, match="cannot test on 'b', which a transform before it has"):
        one_step(Observers("b"), gk.MLDG(test="b"), form=form)


def test_rules_that_set_the_update_cannot_come_before_it():
    with pytest.raises(ValueError, match="would see only one at a time; put it after"):
        one_step(gk.PCGrad(scope="tensor"), gk.MLDG())


def test_arguments_are_checked():
    with as_users_run_it():
        for value in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match="alpha is"):
                gk.MLDG(alpha=value)
        with pytest.raises(ValueError, match="beta is nan"):
            gk.MLDG(beta=math.nan)
        with pytest.raises(TypeError, match="test is 3; pass the name of an objective, or None"):
            gk.MLDG(test=3)
        with pytest.raises(TypeError, match="generator is 3; pass torch"):
            gk.MLDG(generator=3)
