"""What the elementwise rules have in common, alone and in an optimizer."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from helpers import (
    CONFLICT,
    Observed,
    Weighted,
    as_users_run_it,
    batches,
    linear_objectives,
    relative_error,
    seeded,
)
from torch import nn

import gradkit as gk
from gradkit.core import gram
from surgery.columns import uniform_of

RULES = (gk.AgrSum, gk.AgrRand, gk.GradDrop, gk.ANDMask, gk.SANDMask, gk.TrimmedMean)


def test_the_table_of_values():
    for dtype in (torch.float32, torch.float64):
        jacobian = torch.tensor(CONFLICT, dtype=dtype)
        assert gk.AgrSum()(jacobian).tolist() == [0.0, 2.0, 2.0]
        assert gk.ANDMask()(jacobian).tolist() == [0.0, 1.0, 1.0]
        assert gk.SANDMask()(jacobian).tolist() == [0.0, 1.0, 1.0]
        assert gk.TrimmedMean()(jacobian).tolist() == [1.0, 1.0, 1.0]
        assert gk.AgrRand()(jacobian)[1:].tolist() == [2.0, 2.0]
        drop = gk.GradDrop(generator=seeded(0))
        (u, *_) = uniform_of(drop, 3)
        assert drop(jacobian).tolist() == [6.0 if u < 0.6 else -4.0, 2.0, 2.0]


@pytest.mark.parametrize("make", RULES)
def test_blocks_change_nothing(make, monkeypatch):
    jacobian = torch.randn(5, 1000, generator=seeded(0), dtype=torch.float64)
    whole = make()(jacobian)
    # Within a block of the usual size, the same numbers are drawn for the same columns.
    monkeypatch.setattr(gram, "_ELEMENTS", 35)
    torch.testing.assert_close(make()(jacobian), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("make", RULES)
def test_one_objective_passes_through(make):
    gradient = torch.tensor([[2.0, -3.0, 0.0, 1e-30, -1e30]])
    assert torch.equal(make()(gradient), gradient[0])


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("count", [2, 5])
def test_zeros_stay_zeros(make, count):
    assert make()(torch.zeros(count, 4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_nan_stays_one(make, count):
    jacobian = torch.randn(count, 6, generator=seeded(count))
    jacobian[-1, 0] = torch.nan
    for seed in range(4):
        options = {"generator": seeded(seed)} if make().generator is not None else {}
        assert make(**options)(jacobian)[0].isnan()


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_come_back_as_they_went_in(make, dtype):
    jacobian = torch.randn(4, 50, generator=seeded(0)).to(dtype)
    narrow, expected = make()(jacobian), make()(jacobian.double())
    assert narrow.dtype == dtype
    # A purity may lie on the other side of its number.
    close = (narrow.double() - expected).abs() < 16 * torch.finfo(dtype).eps
    assert int((~close).sum()) <= (1 if make is gk.GradDrop else 0)


@pytest.mark.parametrize("make", RULES)
def test_the_jacobian_is_only_read(make):
    jacobian = torch.randn(4, 50, generator=seeded(0))
    before = jacobian.clone()
    make()(jacobian)
    assert torch.equal(jacobian, before)


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_they_are_homogeneous(make, factor):
    jacobian = torch.randn(4, 50, generator=seeded(0), dtype=torch.float64)
    if make is gk.SANDMask:
        assert make.degree is None
    else:
        torch.testing.assert_close(make()(factor * jacobian), factor * make()(jacobian))


def test_random_numbers_are_the_generators_own():
    jacobian = torch.randn(3, 40, generator=seeded(0))
    before = torch.get_rng_state()
    for make in (gk.GradDrop, gk.AgrRand):
        runs = []
        for generator in (seeded(1), seeded(1), seeded(2), None, None):
            rule = make(generator=generator)
            runs.append(torch.stack([rule(jacobian) for _ in range(3)]))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])
        assert torch.equal(runs[3], runs[4])
        assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_are_checked():
    cases = (
        (gk.GradDrop, {"leak": [1.5]}, ValueError, "in leak is 1.5; it must be between 0 and 1"),
        (gk.GradDrop, {"leak": {"a": 1.5}}, ValueError, "a number in leak is 1.5"),
        (gk.GradDrop, {"leak": [-0.5]}, ValueError, "a number in leak is -0.5"),
        (gk.GradDrop, {"leak": 0.5}, TypeError, "leak is 0.5"),
        (gk.GradDrop, {"function": 2}, TypeError, "function is 2"),
        (gk.AgrRand, {"generator": 3}, TypeError, "generator is 3"),
        (gk.ANDMask, {"tau": 1.5}, ValueError, "tau is 1.5; it must be between 0 and 1"),
        (gk.ANDMask, {"tau": "1"}, TypeError, "tau is '1'"),
        (gk.SANDMask, {"tau": 1.0}, ValueError, "tau is 1.0; it must be at least 0 and less"),
        (gk.SANDMask, {"k": 0.0}, ValueError, "k is 0.0; it must be positive"),
        (gk.TrimmedMean, {"trim": -1}, ValueError, "trim is -1; it must be at least 0"),
        (gk.TrimmedMean, {"trim": 1.0}, TypeError, "trim is 1.0; pass a whole number"),
    )
    with as_users_run_it():
        for make, arguments, error, message in cases:
            with pytest.raises(error, match=message):
                make(**arguments)


RANDOM = (gk.AgrRand, gk.GradDrop)
every_rule = pytest.mark.parametrize("make", RULES)
random_rule = pytest.mark.parametrize("make", RANDOM)


def step_with(rows, *transforms, **options):
    """The direction of one step on objectives of these gradients, and its record."""
    parameters = [nn.Parameter(torch.zeros(size, dtype=rows.dtype)) for size in (3, 1, 4, 2)]
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=1.0), *transforms, **options)
    optimizer.step(linear_objectives(parameters, rows))
    return -torch.cat([parameter.detach() for parameter in parameters]), optimizer.last_step


def normal(count, seed=0):
    return torch.randn(count, 10, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("make", [gk.AgrSum, gk.ANDMask, gk.SANDMask, gk.TrimmedMean])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_is_what_the_rule_makes_of_the_gradients(make, count):
    rows = normal(count)
    assert torch.equal(step_with(rows, make())[0], make()(rows))


@every_rule
def test_an_observer_is_invisible_to_the_rule(make):
    rows = normal(4)
    expected, _ = step_with(rows[[0, 2, 3]], make())
    direction, record = step_with(rows, Observed("b"), make())
    assert torch.equal(direction, expected)
    assert float(record.weights[1]) == 0.0
    direction, _ = step_with(rows, Weighted(b=0.0), make())
    torch.testing.assert_close(direction, expected)
    rows[1] = torch.inf
    direction, _ = step_with(rows, Observed("b"), make(), nonfinite="ignore")
    assert torch.equal(direction, expected)


@every_rule
def test_the_rule_sees_the_weighted_gradients(make):
    rows = normal(3)
    factors = torch.tensor([2.0, 0.5, -3.0], dtype=torch.float64)
    expected, _ = step_with(factors[:, None] * rows, make())
    direction, _ = step_with(rows, Weighted(a=2.0, b=0.5, c=-3.0), make())
    torch.testing.assert_close(direction, expected)


@every_rule
def test_only_observers_leave_nothing_to_do(make):
    assert step_with(normal(2), Observed("a", "b"), make())[0].tolist() == [0.0] * 10


@random_rule
def test_noise_is_drawn_once_a_step_and_kept_at_displaced_points(make):
    """SAM evaluates the rule twice; linear objectives have equal gradients at both points."""
    rows = normal(3)
    once, _ = step_with(rows, make(generator=seeded(3)))
    direction, _ = step_with(rows, make(generator=seeded(3)), gk.SAM(rho=0.1))
    torch.testing.assert_close(direction, once, rtol=1e-9, atol=1e-12)


@random_rule
def test_noise_is_drawn_anew_in_each_step(make):
    rows = normal(2)
    parameters = [nn.Parameter(torch.zeros(10, dtype=torch.float64))]
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=1.0), make())
    places = [parameters[0].detach().clone()]
    for _ in range(4):
        optimizer.step(linear_objectives(parameters, rows))
        places.append(parameters[0].detach().clone())
    steps = [before - after for before, after in pairwise(places)]
    assert not all(torch.allclose(steps[0], step) for step in steps[1:])


@random_rule
def test_noise_does_not_depend_on_the_memory_format(make):
    """A channels-last parameter moves as a contiguous one does."""
    rows = torch.randn(3, 120, generator=seeded(0), dtype=torch.float64)
    moved = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = torch.zeros(2, 3, 4, 5, dtype=torch.float64).to(memory_format=memory_format)
        parameter = nn.Parameter(weight)
        optimizer = gk.wrap(torch.optim.SGD([parameter], lr=1.0), make(generator=seeded(5)))
        parts = [row.view(2, 3, 4, 5) for row in rows]
        optimizer.step(
            {n: lambda part=p: (parameter * part).sum() for n, p in zip("abc", parts, strict=True)}
        )
        moved.append(parameter.detach().contiguous())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-12, atol=0)


@every_rule
def test_no_other_rule_can_follow(make):
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=f"PCGrad.* cannot follow {make.__name__}"):
        gk.wrap(torch.optim.SGD([parameter], lr=1.0), make(), gk.PCGrad())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()


def train(model, optimizer, data):
    for x, y in data:

        def losses(x=x, y=y):
            out = model(x)
            return {"fit": (out - y).square().mean(), "small": out.abs().mean(), "c": out[0, 0]}

        optimizer.step(losses)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@random_rule
@pytest.mark.parametrize("engine", ["functional", "inplace"])
def test_training_goes_on_bit_for_bit(make, engine):
    """After saving and loading, as a copy, and after a pickle."""

    def wrapped(model):
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        return gk.wrap(base, make(), gk.SAM(), model=model, engine=engine)

    data = list(batches(6))
    model = network()
    optimizer = wrapped(model)
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    twin, copied = copy.deepcopy((model, optimizer))
    expected = train(model, optimizer, data[3:])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = network()
    again.load_state_dict(weights)
    other = wrapped(again)
    other.load_state_dict(state)
    assert torch.equal(train(again, other, data[3:]), expected)
    assert torch.equal(train(twin, copied, data[3:]), expected)


@random_rule
def test_a_step_that_is_not_applied_draws_nothing(make):
    rows = normal(3)
    rule = make()
    before = rule.generator.get_state()
    rows[0, 0] = torch.nan
    step_with(rows, rule, nonfinite="skip")
    assert torch.equal(rule.generator.get_state(), before)


@random_rule
def test_alone_an_owned_rule_leaves_its_generator_as_it_was(make):
    rule = make()
    optimizer = gk.wrap(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0), rule)
    assert torch.equal(rule(normal(2)), rule(normal(2)))
    del optimizer
    assert not torch.equal(rule(normal(2)), rule(normal(2)))


@every_rule
def test_the_engines_agree(make):
    results = []
    for engine in ("functional", "inplace"):
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = gk.wrap(base, make(), model=model, engine=engine)
        results.append(train(model, optimizer, batches(3)))
    assert relative_error(results[0], results[1]) < 1e-10
