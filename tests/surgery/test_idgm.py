import math

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
    hessian_product,
    one_step,
    scaled,
    times,
    total,
)


def idgm_rows(losses, weights, gamma):
    """Each domain's row, by differentiating twice."""
    gradients = {name: grads(loss, weights) for name, loss in losses.items()}
    rows = {}
    for name, loss in losses.items():
        v = total([gradient for other, gradient in gradients.items() if other != name])
        product = hessian_product(loss, weights, v)
        rows[name] = add(gradients[name], product, -2 * gamma / (len(losses) - 1))
    return rows


def idgm(losses, weights, gamma):
    return scaled(total(list(idgm_rows(losses, weights, gamma).values())), 1 / len(losses))


def objective(losses, weights, gamma):
    """L̄ − γ·mean of the products, differentiated as it is written."""
    weights = [weight.detach().requires_grad_() for weight in weights]
    values = [loss(*weights) for loss in losses.values()]
    gradients = [torch.autograd.grad(value, weights, create_graph=True) for value in values]
    count = len(values)
    products = [
        sum((x * y).sum() for x, y in zip(gradients[i], gradients[j], strict=True))
        for i in range(count)
        for j in range(i)
    ]
    value = sum(values) / count - gamma * sum(products) / len(products)
    return list(torch.autograd.grad(value, weights))


# Against the exact gradient.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_equal_the_gradient_of_the_objective(engine, form):
    model, gamma = Perceptron(), 0.05
    weights = explicit(model)
    reference = ReferenceAdam(weights, lr=0.02)
    optimizer = gk.wrap(
        torch.optim.Adam(model.parameters(), lr=0.02),
        gk.IDGM(gamma=gamma),
        model=model,
        engine=engine,
    )
    start = flat(weights)
    for t in range(10):
        loss = optimizer.step(closures(model, domains(t), form))
        expected = sum(f(*weights).item() for f in domains(t).values())
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        reference.step(objective(domains(t), weights, gamma))
        assert optimizer.last_step.weights.tolist() == pytest.approx([1 / 3] * 3)
        assert relative_error(flat(model.parameters()), flat(weights)) < 1e-6
    assert relative_error(flat(weights), start) > 0.1


@pytest.mark.parametrize("count", [2, 3])
def test_the_difference_is_right_to_the_stated_digits(count):
    """Compared on the products alone, in both dtypes."""
    losses = dict(list(domains().items())[:count])
    start = explicit(Perceptron())
    exact = flat(idgm(losses, start, 1.0)) - flat(idgm(losses, start, 0.0))
    assert float(exact.norm()) > float(flat(idgm(losses, start, 0.0)).norm())
    direction, _, _ = one_step(gk.IDGM(gamma=1.0), losses=losses)
    assert relative_error(direction - flat(idgm(losses, start, 0.0)), exact) < 1e-8

    model = Perceptron().float()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = gk.wrap(base, gk.IDGM(gamma=1.0), model=model)

    def narrow(loss):
        return lambda: loss(*(p.double() for p in model.parameters())).float()

    optimizer.step({name: narrow(loss) for name, loss in losses.items()})
    direction = flat(p.grad for p in model.parameters()).double()
    assert relative_error(direction - flat(idgm(losses, start, 0.0)), exact) < 1e-3


def test_float32_throughout_is_right_to_a_thousandth():
    generator = seeded(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    x, y = torch.randn(2, 8, 6, generator=generator), torch.randn(2, 8, 3, generator=generator)

    def direction(dtype, gamma):
        model.to(dtype)
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = gk.wrap(base, gk.IDGM(gamma=gamma), model=model)
        optimizer.step(
            {
                f"{k}": lambda k=k: (model(x[k].to(dtype)) - y[k].to(dtype)).square().mean()
                for k in range(2)
            }
        )
        return flat(p.grad for p in model.parameters()).double()

    products = [
        direction(dtype, 1.0) - direction(dtype, 0.0) for dtype in (torch.float32, torch.float64)
    ]
    assert relative_error(*products) < 1e-3


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3])
def test_the_error_falls_with_the_square_of_epsilon(epsilon):
    start = explicit(Perceptron())
    exact = flat(idgm(domains(), start, 1.0))
    errors = [
        float((one_step(gk.IDGM(1.0, epsilon=e))[0] - exact).norm()) for e in (epsilon, epsilon / 2)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_no_weight_on_the_products_is_the_mean():
    direction, _, start = one_step(gk.IDGM(gamma=0.0))
    expected = total([grads(loss, start) for loss in domains().values()])
    assert relative_error(direction, flat(expected) / 3) < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_one_domain_passes_through(form):
    losses = {"a": domain(0)}
    direction, record, start = one_step(gk.IDGM(gamma=1.0), losses=losses, form=form)
    assert relative_error(direction, flat(grads(losses["a"], start))) < 1e-14
    assert record.weights.tolist() == [1.0]


def test_gradients_of_length_0_have_no_products():
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=1.0), gk.IDGM(gamma=1.0))
    optimizer.step({"a": lambda: w.square().sum(), "b": lambda: w.square().sum()})
    assert w.tolist() == [0.0, 0.0, 0.0]
    optimizer.step({"a": lambda: w.square().sum(), "b": lambda: w.sum()})
    # a's gradient is 0: only H_a·v_a = 2·g_b is left.
    torch.testing.assert_close(-w.data, torch.full((3,), 0.5 - 2.0, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_points_are_as_far_away_whatever_the_losses_scale(scale):
    losses = {name: times(loss, scale) for name, loss in domains().items()}
    direction, _, start = one_step(gk.IDGM(gamma=1 / scale), losses=losses)
    expected = scale * flat(idgm(domains(), start, 1.0))
    assert relative_error(direction.clone(), expected) < (1e-2 if scale < 1 else 1e-7)


@pytest.mark.parametrize("seed", range(10))
def test_its_step_leaves_gradients_that_agree_more_than_after_plain_descent(seed):
    """By first-order: the direction is plain descent less γ times the product's gradient."""
    generator = seeded(seed)
    roots = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    minima = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    hessians, lr, gamma = roots @ roots.mT, 1e-4, 0.1

    def product_after(*transforms):
        w = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def loss(k):
            return lambda: (w - minima[k]) @ hessians[k] @ (w - minima[k]) / 2

        optimizer = gk.wrap(torch.optim.SGD([w], lr=lr), *transforms)
        optimizer.step({"a": loss(0), "b": loss(1)})
        a, b = (hessians[k] @ (w.detach() - minima[k]) for k in range(2))
        return float(a @ b)

    at = -minima
    a, b = hessians[0] @ at[0], hessians[1] @ at[1]
    slope = hessians[0] @ b + hessians[1] @ a
    gain = product_after(gk.IDGM(gamma)) - product_after(gk.Mean())
    assert gain > 0
    assert gain == pytest.approx(lr * gamma * float(slope @ slope), rel=0.1)


# Composition.


@pytest.mark.parametrize("form", FORMS)
def test_an_observer_is_left_out_and_stays_as_it_is(form):
    direction, record, start = one_step(Observers("b"), gk.IDGM(gamma=0.1), form=form)
    losses = {name: loss for name, loss in domains().items() if name != "b"}
    assert relative_error(direction, flat(idgm(losses, start, 0.1))) < 1e-8
    assert record.weights.tolist() == [0.5, 0.0, 0.5]
    own, a = grads(domain(1), start), idgm_rows(losses, start, 0.1)["a"]
    assert float(record.gram[1, 1]) == pytest.approx(dot(own, own), rel=1e-12)
    assert float(record.gram[0, 1]) == pytest.approx(dot(own, a), rel=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_given_weights_are_those_of_weighted_losses(engine):
    factors = {"a": 2.0, "b": 0.5, "c": -1.5}
    transforms = Weighted(**factors), gk.IDGM(gamma=0.1)
    direction, record, start = one_step(*transforms, engine=engine)
    losses = {name: times(loss, factors[name]) for name, loss in domains().items()}
    assert relative_error(direction, flat(objective(losses, start, 0.1))) < 1e-8
    assert record.weights.tolist() == pytest.approx([2 / 3, 0.5 / 3, -0.5])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_sam_around_it(engine, form):
    transforms = gk.IDGM(gamma=0.1), gk.SAM(rho=0.3)
    direction, _, start = one_step(*transforms, engine=engine, form=form)
    d = objective(domains(), start, 0.1)
    expected = objective(domains(), displaced(start, 0.3 / length(d), d), 0.1)
    assert relative_error(direction, flat(expected)) < 1e-7


def test_surgery_after_it_is_between_its_rows():
    losses = {"a": domain(0), "b": times(domain(0), -0.5)}
    direction, _, start = one_step(gk.IDGM(gamma=0.01), gk.PCGrad(), losses=losses)
    a, b = (scaled(row, 0.5) for row in idgm_rows(losses, start, 0.01).values())
    assert dot(a, b) < 0
    wa, wb = 1 - dot(a, b) / dot(a, a), 1 - dot(a, b) / dot(b, b)
    assert relative_error(direction, flat(add(scaled(a, wa), b, wb))) < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_only_and_at_are_honoured(form):
    shift = 0.1 * torch.randn(44, generator=seeded(0), dtype=torch.float64)
    transforms = gk.IDGM(gamma=0.1), Asks("a", "c"), Displaced(shift)
    direction, record, start = one_step(*transforms, form=form)
    parts = [p.view(w.shape) for p, w in zip(shift.split([15, 5, 20, 4]), start, strict=True)]
    losses = {name: domains()[name] for name in "ac"}
    assert record.names == ("a", "c")
    assert relative_error(direction, flat(objective(losses, add(start, parts), 0.1))) < 1e-8


def test_a_learning_rate_scaled_inside_is_that_at_the_weights():
    _, record, start = one_step(gk.CosineLR("a", "b", activation="linear"), gk.IDGM(gamma=0.1))
    a, b = grads(domain(0), start), grads(domain(1), start)
    cosine = dot(a, b) / (length(a) * length(b))
    assert float(record.lr_scale) == pytest.approx((1 + cosine) / 2, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_the_cost_is_three_gradients_of_each(engine, form):
    model = Perceptron()
    counts = {name: {"forward": 0, "backward": 0} for name in NAMES}
    losses = {
        name: lambda *weights, f=f, name=name: counted(f(*weights), counts[name])
        for name, f in domains().items()
    }
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.IDGM(), model=model, engine=engine)
    optimizer.step(closures(model, losses, form))
    forwards = 3 if form == "one by one" else 7
    assert counts == {name: {"forward": forwards, "backward": 3} for name in NAMES}


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_and_batch_norm(engine):
    """With replayed draws the losses are the same at all points; statistics move once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 1)
    )
    model.double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)

    def direction(gamma):
        torch.manual_seed(1)
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = gk.wrap(base, gk.IDGM(gamma), model=model, engine=engine, replay_rng=True)
        optimizer.step({f"{k}": lambda k=k: model(x[k]).square().mean() for k in range(2)})
        return flat(p.grad for p in model.parameters())

    torch.manual_seed(1)
    model.train()
    values = [model(x[k]).square().mean() for k in range(2)]
    parameters = list(model.parameters())
    a, b = (torch.autograd.grad(v, parameters, create_graph=True) for v in values)
    product = sum((p * q).sum() for p, q in zip(a, b, strict=True))
    exact = flat(torch.autograd.grad(product, parameters))
    before = int(model[1].num_batches_tracked)
    assert relative_error(direction(0.0) - direction(1.0), exact) < 1e-7
    assert int(model[1].num_batches_tracked) == before + 4


# Contract and errors.


@pytest.mark.parametrize("scale", [1e15, 1e25])
def test_products_that_overflow_are_found(scale):
    """Losses and their gradients are finite in float32, and the product of Hessian and v is not."""
    w = nn.Parameter(torch.ones(2))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.IDGM(gamma=1e12), nonfinite="skip")
    optimizer.step({"a": lambda: scale * w.square().sum(), "b": lambda: scale * w.sum()})
    assert not optimizer.last_step.applied
    assert w.tolist() == [1.0, 1.0]


def test_the_contract():
    gk.testing.check_optimizer_contract(
        lambda model: gk.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1), gk.IDGM(0.1), model=model
        ),
        ("a", "b"),
    )


def test_rules_that_set_the_update_cannot_come_before_it():
    with pytest.raises(ValueError, match="cannot follow a transform that has set the update"):
        one_step(gk.PCGrad(scope="tensor"), gk.IDGM())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_without_the_digits_are_refused(dtype):
    w = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), gk.IDGM())
    with pytest.raises(ValueError, match=f"gradients, which {dtype} cannot resolve; keep"):
        optimizer.step({"a": lambda: w.sum(), "b": lambda: w.square().sum()})


def test_arguments_are_checked():
    with as_users_run_it():
        with pytest.raises(ValueError, match="gamma is nan"):
            gk.IDGM(gamma=math.nan)
        for value in (0.0, -1e-3):
            with pytest.raises(ValueError, match=f"epsilon is {value}; pass a positive distance"):
                gk.IDGM(epsilon=value)
        with pytest.raises(TypeError, match="epsilon is 'small'; pass a number"):
            gk.IDGM(epsilon="small")
