import itertools
import math

import pytest
import torch
from helpers import (
    Perceptron,
    ReferenceAdam,
    ReferenceSGD,
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
from gradkit.core.context import Context
from gradkit.core.flat import Layout, Pool
from gradkit.surgery.visit_order import VisitOrder
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


def fish_rows(losses, order, weights, alpha):
    """Algorithm 1's inner loop: each domain's gradient, by name, where the others have led."""
    there, rows = list(weights), {}
    for name in order:
        rows[name] = grads(losses[name], there)
        there = add(there, rows[name], -alpha)
    return rows


def orders(seed, count=3):
    generator = seeded(seed)
    while True:
        yield [NAMES[k] for k in torch.randperm(count, generator=generator).tolist()]


def fish(model, *transforms, lr=1.0, engine="functional", **options):
    base = torch.optim.SGD(model.parameters(), lr=lr)
    return gk.wrap(base, *transforms, model=model, engine=engine, **options)


# Against references written by hand.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["SGD with momentum", "Adam"])
def test_ten_steps_equal_algorithm_1(engine, form, base):
    model, alpha = Perceptron(), 0.1
    weights = explicit(model)
    if base == "Adam":
        reference = ReferenceAdam(weights, lr=0.02)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    else:
        reference = ReferenceSGD(weights, lr=0.01, momentum=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    transform = gk.Fish(inner_lr=alpha, generator=seeded(7))
    optimizer = gk.wrap(optimizer, transform, model=model, engine=engine)
    drawn, start = orders(7), flat(weights)
    for t in range(10):
        loss = optimizer.step(closures(model, domains(t), form))
        order = next(drawn)
        rows = fish_rows(domains(t), order, weights, alpha)
        there, expected = list(weights), 0.0
        for name in order:
            # A closure that returns all losses has returned them at θ.
            expected += domains(t)[name](*(there if form == "one by one" else weights)).item()
            there = add(there, rows[name], -alpha)
        reference.step(total(list(rows.values())))
        assert float(loss) == pytest.approx(expected, rel=1e-12)
        record = optimizer.last_step
        assert record.names == NAMES
        assert record.weights.tolist() == [1.0, 1.0, 1.0]
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-10
    assert relative_error(flat(weights), start) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_on_sgd_it_is_the_weights_moved_part_of_the_way(engine):
    """θ ← θ + ε(θ̃ − θ) with a network of its own for θ̃, as the authors' code has it."""
    model, alpha, epsilon = Perceptron(), 0.1, 0.5
    other = Perceptron()
    drawn = orders(0)
    optimizer = fish(model, gk.Fish(inner_lr=alpha), lr=epsilon * alpha, engine=engine)
    for t in range(10):
        optimizer.step(closures(model, domains(t)))
        clone = Perceptron()
        clone.load_state_dict(other.state_dict())
        inside = torch.optim.SGD(clone.parameters(), lr=alpha)
        for name in next(drawn):
            inside.zero_grad()
            domains(t)[name](*clone.parameters()).backward()
            inside.step()
        with torch.no_grad():
            for ours, theirs in zip(other.parameters(), clone.parameters(), strict=True):
                ours += epsilon * (theirs - ours)
        assert relative_error(flat(model.parameters()), flat(other.parameters())) < 1e-10


def test_the_order_is_the_objectives_own_unless_shuffled():
    direction, _, start = one_step(gk.Fish(inner_lr=0.1, shuffle=False))
    rows = fish_rows(domains(), NAMES, start, 0.1)
    assert relative_error(direction, flat(total(list(rows.values())))) < 1e-12
    other = fish_rows(domains(), NAMES[::-1], start, 0.1)
    assert relative_error(flat(total(list(other.values()))), direction) > 1e-3


def test_every_order_is_drawn_equally_often():
    layout = Layout.of([{"params": [nn.Parameter(torch.zeros(1))]}])
    base = torch.optim.SGD(layout.parameters)
    context = Context(layout, Pool(layout), base, names=NAMES)
    generator, counts = seeded(0), {}
    for _ in range(1200):
        visits = VisitOrder(context, generator)
        order = visits.order(None)
        assert visits.order(None) == order
        assert visits.order("ac") == tuple(name for name in order if name != "b")
        counts[order] = counts.get(order, 0) + 1
    assert sorted(counts) == sorted(itertools.permutations(NAMES))
    assert all(150 < count < 250 for count in counts.values())


def test_no_inner_step_is_plain_descent():
    direction, _, start = one_step(gk.Fish(inner_lr=0.0))
    expected = total([grads(loss, start) for loss in domains().values()])
    assert relative_error(direction, flat(expected)) < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_one_domain_passes_through(form):
    losses = {"a": domain(0)}
    direction, record, start = one_step(gk.Fish(inner_lr=0.5), losses=losses, form=form)
    assert relative_error(direction, flat(grads(losses["a"], start))) < 1e-14
    assert record.names == ("a",)


# Composition.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_an_observer_is_left_out_and_stays_where_it_is(form, seed):
    """Whatever its place in the order; the others' order is what is left of the whole one."""
    transforms = Observers("b"), gk.Fish(inner_lr=0.1, generator=seeded(seed))
    direction, record, start = one_step(*transforms, form=form)
    order = [name for name in next(orders(seed)) if name != "b"]
    rows = fish_rows(domains(), order, start, 0.1)
    assert relative_error(direction, flat(add(rows["a"], rows["c"]))) < 1e-12
    assert record.weights.tolist() == [1.0, 0.0, 1.0]
    own = grads(domain(1), start)
    assert float(record.gram[1, 1]) == pytest.approx(dot(own, own), rel=1e-12)
    assert float(record.gram[0, 1]) == pytest.approx(dot(rows["a"], own), rel=1e-12)


def test_only_observers_leave_nothing_to_do():
    direction, record, _ = one_step(Observers(*NAMES), gk.Fish())
    assert not direction.any()
    assert not record.weights.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_given_weights_are_those_of_weighted_losses(engine):
    factors = {"a": 2.0, "b": 0.5, "c": -1.5}
    transforms = Weighted(**factors), gk.Fish(inner_lr=0.1, generator=seeded(1))
    direction, record, start = one_step(*transforms, engine=engine)
    losses = {name: times(loss, factors[name]) for name, loss in domains().items()}
    rows = fish_rows(losses, next(orders(1)), start, 0.1)
    assert relative_error(direction, flat(total(list(rows.values())))) < 1e-12
    assert record.weights.tolist() == [*factors.values()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_sam_around_it_keeps_the_order_at_the_displaced_point(engine, form):
    transforms = gk.Fish(inner_lr=0.1, generator=seeded(3)), gk.SAM(rho=0.3)
    direction, _, start = one_step(*transforms, engine=engine, form=form)
    order = next(orders(3))
    d = total(list(fish_rows(domains(), order, start, 0.1).values()))
    there = displaced(start, 0.3 / length(d), d)
    expected = total(list(fish_rows(domains(), order, there, 0.1).values()))
    assert relative_error(direction, flat(expected)) < 1e-12


def test_around_sam_each_domain_ascends_from_its_own_point():
    transforms = gk.SAM(rho=0.3), gk.Fish(inner_lr=0.1, shuffle=False)
    direction, _, start = one_step(*transforms)
    there, expected = list(start), []
    for loss in domains().values():
        g = grads(loss, there)
        expected.append(grads(loss, displaced(there, 0.3 / length(g), g)))
        there = add(there, expected[-1], -0.1)
    assert relative_error(direction, flat(total(expected))) < 1e-12


def test_surgery_after_it_is_between_its_rows():
    losses = {"a": domain(0), "b": times(domain(0), -0.5)}
    direction, record, start = one_step(gk.Fish(0.1, shuffle=False), gk.PCGrad(), losses=losses)
    rows = fish_rows(losses, ("a", "b"), start, 0.1)
    a, b = rows["a"], rows["b"]
    assert dot(a, b) < 0
    weights = [1 - dot(a, b) / dot(a, a), 1 - dot(a, b) / dot(b, b)]
    assert relative_error(direction, flat(add(scaled(a, weights[0]), b, weights[1]))) < 1e-10
    assert record.weights.tolist() == pytest.approx(weights, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_only_and_at_are_honoured(form):
    shift = 0.1 * torch.randn(44, generator=seeded(0), dtype=torch.float64)
    transforms = gk.Fish(0.1, generator=seeded(2)), Asks("a", "c"), Displaced(shift)
    direction, record, start = one_step(*transforms, form=form)
    parts = [p.view(w.shape) for p, w in zip(shift.split([15, 5, 20, 4]), start, strict=True)]
    order = [name for name in next(orders(2)) if name != "b"]
    rows = fish_rows({k: domains()[k] for k in "ac"}, order, add(start, parts), 0.1)
    assert record.names == ("a", "c")
    assert relative_error(direction, flat(add(rows["a"], rows["c"]))) < 1e-12


def test_a_learning_rate_scaled_inside_is_the_last_domains():
    cosine, alpha = gk.CosineLR("a", "b", activation="linear"), 0.1
    transforms = cosine, gk.Fish(alpha, shuffle=False)
    _, record, start = one_step(*transforms)
    there = list(start)
    for name in ("a", "b"):
        there = add(there, grads(domains()[name], there), -alpha)
    a, b = grads(domain(0), there), grads(domain(1), there)
    expected = (1 + dot(a, b) / (length(a) * length(b))) / 2
    assert float(record.lr_scale) == pytest.approx(expected, rel=1e-12)
    _, record, _ = one_step(gk.Fish(alpha, shuffle=False), cosine)
    rows = fish_rows(domains(), NAMES, start, alpha)
    cos = dot(rows["a"], rows["b"]) / (length(rows["a"]) * length(rows["b"]))
    assert float(record.lr_scale) == pytest.approx((1 + cos) / 2, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_the_cost_is_one_gradient_of_each(engine, form):
    model = Perceptron()
    counts = {name: {"forward": 0, "backward": 0} for name in NAMES}
    losses = {
        name: lambda *weights, f=f, name=name: counted(f(*weights), counts[name])
        for name, f in domains().items()
    }
    fish(model, gk.Fish(), engine=engine).step(closures(model, losses, form))
    forwards = 1 if form == "one by one" else 3
    assert counts == {name: {"forward": forwards, "backward": 1} for name in NAMES}


def test_an_observer_costs_one_more_gradient_at_most_once_in_a_step():
    """The second evaluation, SAM's, knows it as one. It is drawn neither first nor last here."""
    assert next(orders(5))[1] == "b"
    counts = {"forward": 0, "backward": 0}
    losses = domains() | {"b": lambda *weights: counted(domain(1)(*weights), counts)}
    one_step(Observers("b"), gk.Fish(generator=seeded(5)), gk.SAM(), losses=losses)
    assert counts == {"forward": 3, "backward": 3}


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_see_each_domain_once_where_it_is_visited(engine):
    def network():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.1), nn.Linear(4, 1))
        with torch.no_grad():
            for number, parameter in enumerate(model.double().parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(number)))
        return model

    inputs = torch.randn(2, 6, 3, generator=seeded(5), dtype=torch.float64)
    model, plain = network(), network()
    optimizer = fish(model, gk.Fish(0.2, shuffle=False), gk.SAM(rho=0.5), engine=engine)
    optimizer.step({f"{k}": lambda x=x: model(x).square().mean() for k, x in enumerate(inputs)})
    inside = torch.optim.SGD(plain.parameters(), lr=0.2)
    for x in inputs:
        inside.zero_grad()
        plain(x).square().mean().backward()
        inside.step()
    assert int(model[1].num_batches_tracked) == 2
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# State, contract and errors.


def test_the_order_goes_on_where_a_checkpoint_was_taken():
    def run(steps, start=None):
        model = Perceptron()
        optimizer = fish(model, gk.Fish(0.1), lr=0.05)
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
        lambda model: fish(model, gk.Fish(0.1), lr=0.1, engine="inplace"), ("a", "b", "c")
    )


def test_rules_that_set_the_update_cannot_come_before_it():
    with pytest.raises(ValueError, match="would see only one at a time; put it after"):
        one_step(gk.PCGrad(scope="tensor"), gk.Fish())


def test_arguments_are_checked():
    with as_users_run_it():
        for value in (-0.1, math.nan):
            with pytest.raises(ValueError, match=f"inner_lr is {value}"):
                gk.Fish(inner_lr=value)
        with pytest.raises(TypeError, match=r"inner_lr is '0\.1'; pass a number"):
            gk.Fish(inner_lr="0.1")
        with pytest.raises(TypeError, match="generator is 3; pass torch"):
            gk.Fish(generator=3)
