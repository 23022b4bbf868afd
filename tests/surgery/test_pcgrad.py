"""PCGrad, alone and in a step, and its weights in each of the ways to compute them."""

from __future__ import annotations

import pytest
import pytorch_optimizer
import torch
from helpers import (
    CONFLICT,
    Observed,
    Weighted,
    as_users_run_it,
    jacobians,
    quarters,
    relative_error,
    seeded,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchjd.aggregation import PCGrad as TorchjdPCGrad

import gradkit as gk
from gradkit.surgery import RuleInputs
from gradkit.surgery.pcgrad import pcgrad_weights
from surgery.rule_steps import SIZES, step_with


def sequential_pcgrad(jacobian, order):
    """Algorithm 1 of Yu et al., vector by vector."""
    total = torch.zeros_like(jacobian[0])
    for i, gradient in enumerate(jacobian):
        projected = gradient.clone()
        for j in order[i].tolist():
            other = jacobian[j]
            product = torch.dot(projected, other)
            if j != i and product < 0:
                projected = projected - product / torch.dot(other, other) * other
        total += projected
    return total


def orders(count):
    """A random order for each objective, drawn by the generator that a rule would use."""
    return st.integers(0, 2**31).map(
        lambda seed: torch.stack(
            [torch.randperm(count, generator=seeded(seed + i)) for i in range(count)]
        )
    )


# The rules alone.


def test_the_table_of_values():
    jacobian = torch.tensor(CONFLICT)
    table = {
        gk.PCGrad(): (0.5848, 3.8012, 3.8012),
        gk.PCGrad(reduction="mean"): (0.2924, 1.9006, 1.9006),
        gk.Sum(): (2.0, 2.0, 2.0),
        gk.Mean(): (1.0, 1.0, 1.0),
    }
    for rule, expected in table.items():
        assert rule(jacobian).tolist() == pytest.approx(expected, abs=5e-5), rule
        assert rule(jacobian.double()).tolist() == pytest.approx(expected, abs=5e-5), rule


def test_the_weights_of_the_table():
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    expected = [1 + 22 / 18, 1 + 22 / 38]
    assert gk.PCGrad().weights(gram).tolist() == pytest.approx(expected, rel=1e-14)
    assert gk.Sum().weights(gram).tolist() == [1.0, 1.0]
    assert gk.Mean().weights(gram).tolist() == [0.5, 0.5]


@settings(deadline=None)
@given(jacobians(2, 2))
def test_pcgrad_of_two_is_its_closed_form_and_algorithm_1(jacobian):
    gram = jacobian @ jacobian.T
    (g11, g12), (_, g22) = gram.tolist()
    conflict = g12 < 0
    expected = [1 - g12 / g11, 1 - g12 / g22] if conflict else [1.0, 1.0]
    assert gk.PCGrad().weights(gram).tolist() == pytest.approx(expected, rel=1e-14)
    order = torch.tensor([[0, 1], [1, 0]])
    direction = gk.PCGrad()(jacobian)
    torch.testing.assert_close(direction, sequential_pcgrad(jacobian, order))
    # The general branch agrees with the closed form: a third objective of length 0 changes nothing.
    padded = torch.zeros(3, 3, dtype=torch.float64)
    padded[:2, :2] = gram
    order = torch.tensor([[2, 1, 0], [0, 2, 1], [0, 1, 2]])
    assert pcgrad_weights(padded, order).tolist() == pytest.approx([*expected, 1.0], rel=1e-14)


@settings(deadline=None, max_examples=300)
@given(jacobians(3, 6).flatmap(lambda j: st.tuples(st.just(j), orders(len(j)))))
def test_pcgrad_is_algorithm_1_in_the_given_order(case):
    jacobian, order = case
    weights = pcgrad_weights(jacobian @ jacobian.T, order)
    expected = sequential_pcgrad(jacobian, order)
    scale = float(jacobian.abs().max()) + 1
    assert float((weights @ jacobian - expected).abs().max()) <= 1e-11 * scale


@pytest.mark.parametrize("count", [3, 4, 6])
def test_pcgrad_draws_its_order_from_its_generator(count):
    jacobian = torch.randn(count, 4, generator=seeded(count), dtype=torch.float64)
    order = gk.PCGrad(generator=seeded(5)).draw(count)
    for row in order:
        assert sorted(row.tolist()) == list(range(count))
    direction = gk.PCGrad(generator=seeded(5))(jacobian)
    assert relative_error(direction, sequential_pcgrad(jacobian, order)) < 1e-13


def test_every_order_of_visits_is_drawn_equally_often():
    rule = gk.PCGrad(generator=seeded(0))
    counts = {}
    for _ in range(1200):
        for i, row in enumerate(rule.draw(3).tolist()):
            visits = (i, tuple(j for j in row if j != i))
            counts[visits] = counts.get(visits, 0) + 1
    assert len(counts) == 6
    assert all(500 < count < 700 for count in counts.values())


def test_the_order_matters_beyond_two():
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    gram = jacobian @ jacobian.T
    one = pcgrad_weights(gram, torch.tensor([[1, 2, 0], [0, 2, 1], [0, 1, 2]]))
    other = pcgrad_weights(gram, torch.tensor([[2, 1, 0], [2, 0, 1], [1, 0, 2]]))
    assert not torch.allclose(one @ jacobian, other @ jacobian)
    with pytest.raises(ValueError, match="with 3 objectives the result depends on their order"):
        pcgrad_weights(gram)


def test_pcgrad_of_two_equals_torchjds():
    theirs = TorchjdPCGrad()
    generator = seeded(0)
    conflicts = 0
    for _ in range(200):
        jacobian = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        conflicts += int(torch.dot(*jacobian) < 0)
        assert relative_error(gk.PCGrad()(jacobian), theirs(jacobian)) < 1e-12
    assert 50 < conflicts < 150


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pcgrad_of_two_equals_pytorch_optimizers(reduction):
    ours, theirs = (torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    base = torch.optim.SGD([theirs], lr=0.1)
    peer = pytorch_optimizer.PCGrad(base, reduction=reduction)
    optimizer = gk.wrap(torch.optim.SGD([ours], lr=0.1), gk.PCGrad(reduction=reduction))
    generator = seeded(0)
    conflicts = 0
    for _ in range(20):
        jacobian = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        optimizer.step(lambda: dict(zip("ab", (jacobian @ ours - 1).square() / 4, strict=True)))
        conflicts += int(optimizer.last_step.cosine("a", "b") < 0)
        peer.pc_backward([*((jacobian @ theirs - 1).square() / 4)])
        base.step()
        torch.testing.assert_close(ours, theirs)
    assert 5 < conflicts < 15
    assert float(ours.detach().norm()) > 0.3


@settings(deadline=None)
@given(jacobians(1, 5), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_pcgrad_is_homogeneous(jacobian, factor, seed):
    once = gk.PCGrad(generator=seeded(seed))(jacobian)
    scaled = gk.PCGrad(generator=seeded(seed))(factor * jacobian)
    torch.testing.assert_close(scaled, factor * once, rtol=1e-9, atol=1e-9 * factor)


@settings(deadline=None)
@given(jacobians(2, 2))
def test_pcgrad_of_two_conflicts_with_neither(jacobian):
    direction = gk.PCGrad()(jacobian)
    # Exactly opposite gradients leave nothing, so the bound is absolute.
    assert float((jacobian @ direction).min()) >= -1e-11


@settings(deadline=None)
@given(jacobians(1, 5))
def test_without_conflict_pcgrad_is_the_sum(jacobian):
    jacobian = jacobian.abs()
    torch.testing.assert_close(gk.PCGrad()(jacobian), jacobian.sum(0))


@settings(deadline=None)
@given(jacobians(1, 6), st.integers(0, 99))
def test_the_mean_is_the_sum_divided_by_the_number_of_objectives(jacobian, seed):
    total = gk.PCGrad(generator=seeded(seed))(jacobian)
    mean = gk.PCGrad(reduction="mean", generator=seeded(seed))(jacobian)
    torch.testing.assert_close(mean * len(jacobian), total)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("make", [gk.PCGrad, gk.Sum, gk.Mean])
def test_batches_of_gram_matrices_give_what_a_loop_gives(count, make):
    jacobians = torch.randn(2, 3, count, 5, generator=seeded(count), dtype=torch.float64)
    jacobians[1, 2, 0] = 0
    grams = jacobians @ jacobians.mT
    rule = make()
    draws = rule.draw(count)
    batched, _ = rule.weigh(RuleInputs(grams, draws=draws), {})
    assert batched.shape == (2, 3, count)
    for i in range(2):
        for j in range(3):
            one, _ = rule.weigh(RuleInputs(grams[i, j], draws=draws), {})
            torch.testing.assert_close(batched[i, j], one)


def test_the_same_seed_gives_the_same_bits():
    jacobians = torch.randn(10, 5, 4, generator=seeded(1))
    runs = []
    for seed in (3, 3, 4):
        rule = gk.PCGrad(generator=seeded(seed))
        runs.append(torch.stack([rule(jacobian) for jacobian in jacobians]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    default = [torch.stack([rule(j) for j in jacobians]) for rule in (gk.PCGrad(), gk.PCGrad())]
    assert torch.equal(*default)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    gk.PCGrad()(torch.randn(5, 4, generator=seeded(0)))
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None)
@given(jacobians(1, 5))
def test_the_jacobian_is_only_read(jacobian):
    before = jacobian.clone()
    gk.PCGrad()(jacobian)
    assert torch.equal(jacobian, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_come_back_as_they_went_in(dtype):
    jacobian = torch.randn(4, 6, generator=seeded(0)).to(dtype)
    direction = gk.PCGrad()(jacobian)
    assert direction.dtype == dtype
    expected = gk.PCGrad()(jacobian.double())
    assert relative_error(direction, expected) < 4 * torch.finfo(dtype).eps


def test_arguments_are_checked():
    with as_users_run_it():
        with pytest.raises(ValueError, match="scope is 'layer'; choose one of global, group, tens"):
            gk.PCGrad(scope="layer")
        with pytest.raises(ValueError, match="reduction is 'max'; choose 'sum' or 'mean'"):
            gk.PCGrad(reduction="max")
    for scope in ("group", "tensor"):
        with pytest.raises(ValueError, match=f"works by {scope}, and a bare matrix"):
            gk.PCGrad(scope=scope)(torch.ones(2, 3))


# The rules in a step.


def blocks(scope):
    ends = torch.tensor(SIZES).cumsum(0).tolist()
    if scope == "tensor":
        return list(zip([0, *ends[:-1]], ends, strict=True))
    return [(0, 4), (4, 10)] if scope == "group" else [(0, 10)]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 5).flatmap(
        lambda count: st.lists(
            st.lists(quarters, min_size=10, max_size=10), min_size=count, max_size=count
        )
    ),
    st.sampled_from(["global", "group", "tensor"]),
    st.sampled_from(["sum", "mean"]),
)
def test_a_scope_applies_the_rule_to_each_block(rows, scope, reduction):
    rows = torch.tensor(rows, dtype=torch.float64)
    assume(rows.abs().max() > 0)
    count = len(rows)
    rule = gk.PCGrad(scope=scope, reduction=reduction, generator=seeded(3))
    direction, _ = step_with(rows, rule)
    order = gk.PCGrad(generator=seeded(3)).draw(count)
    order = torch.tensor([[0, 1], [0, 1]]) if order is None else order
    for start, stop in blocks(scope):
        expected = sequential_pcgrad(rows[:, start:stop], order)
        expected = expected / count if reduction == "mean" else expected
        torch.testing.assert_close(direction[start:stop], expected, rtol=1e-10, atol=1e-10)


def test_scopes_differ():
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    results = [
        step_with(rows, gk.PCGrad(scope=scope))[0] for scope in ("global", "group", "tensor")
    ]
    for i in range(3):
        assert not torch.allclose(results[i], results[i - 1])


class Products(TorchDispatchMode):
    """Counts the columns of gradients, one row for each of `count`, that products are taken of."""

    def __init__(self, count):
        super().__init__()
        self.count = count
        self.columns = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            left, right = args[:2]
            if (left.shape[-2], right.shape[-1]) == (self.count, self.count):
                self.columns += left.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_products_by_tensor_serve_for_the_whole(scope):
    """Rows are read once for both."""
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    with Products(3) as products:
        _, record = step_with(rows, gk.PCGrad(scope=scope))
    assert products.columns == 10
    torch.testing.assert_close(record.gram, rows @ rows.T)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_an_observer_is_invisible_to_the_rule(scope):
    rows = torch.randn(4, 10, generator=seeded(0), dtype=torch.float64)
    seen = rows[[0, 2, 3]]
    expected, without = step_with(seen, gk.PCGrad(scope=scope, generator=seeded(1)))
    rule = gk.PCGrad(scope=scope, generator=seeded(1))
    direction, record = step_with(rows, Observed("b"), rule)
    torch.testing.assert_close(direction, expected, rtol=0, atol=1e-14)
    assert record.names == ("a", "b", "c", "d")
    assert float(record.weights[1]) == 0.0
    torch.testing.assert_close(record.weights[[0, 2, 3]], without.weights)
    torch.testing.assert_close(record.gram, rows @ rows.T)
    # A weight that is 0 by arithmetic rather than by declaration counts as well.
    rule = gk.PCGrad(scope=scope, generator=seeded(1))
    direction, _ = step_with(rows, Weighted(b=0.0), rule)
    torch.testing.assert_close(direction, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_an_infinite_observer_leaves_the_direction_finite(scope):
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    rows[1] = torch.inf
    expected, _ = step_with(rows[[0, 2]], gk.PCGrad(scope=scope))
    rule = gk.PCGrad(scope=scope)
    direction, _ = step_with(rows, Observed("b"), rule, nonfinite="ignore")
    torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_the_rule_sees_the_weighted_gradients(scope):
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    factors = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    expected, _ = step_with(factors[:, None] * rows, gk.PCGrad(scope=scope, generator=seeded(1)))
    direction, _ = step_with(
        rows, Weighted(a=2.0, b=0.5, c=3.0), gk.PCGrad(scope=scope, generator=seeded(1))
    )
    torch.testing.assert_close(direction, expected)


def test_rules_follow_each_other():
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    direction, record = step_with(rows, gk.Mean(), gk.PCGrad(generator=seeded(1)))
    order = gk.PCGrad(generator=seeded(1)).draw(3)
    assert relative_error(direction, sequential_pcgrad(rows / 3, order)) < 1e-13
    torch.testing.assert_close(record.weights @ rows, direction)


def test_only_observers_leave_nothing_to_do():
    rows = torch.randn(2, 10, generator=seeded(0))
    direction, record = step_with(rows, Observed("a", "b"), gk.PCGrad())
    assert direction.tolist() == [0.0] * 10
    assert record.weights.tolist() == [0.0, 0.0]


def test_one_objective_passes_through():
    rows = torch.randn(1, 10, generator=seeded(0), dtype=torch.float64)
    for rule in (gk.PCGrad(), gk.PCGrad(scope="tensor"), gk.Sum(), gk.Mean()):
        assert torch.equal(step_with(rows, rule)[0], rows[0])


def test_the_order_is_drawn_once_a_step_and_kept_at_displaced_points():
    """SAM around PCGrad evaluates it twice; linear objectives have equal gradients at both."""
    rows = torch.randn(4, 10, generator=seeded(0), dtype=torch.float64)
    drawn = []

    class Watched(gk.PCGrad):
        def draw(self, count):
            drawn.append(super().draw(count))
            return drawn[-1]

    direction, _ = step_with(rows, Watched(), gk.SAM(rho=0.1))
    assert len(drawn) == 1
    torch.testing.assert_close(direction, sequential_pcgrad(rows, drawn[0]))


WAYS = {
    "one matrix": lambda gram: gram,  # in Python's numbers, where there are few objectives
    "a batch": lambda gram: gram[None],  # in numpy
    "with a graph": lambda gram: gram.clone().requires_grad_(),  # in torch
}


def weights_by(way, gram, order):
    weights = pcgrad_weights(WAYS[way](gram), order)
    assert weights.requires_grad == (way == "with a graph")
    return weights.detach().reshape(-1)


@pytest.mark.parametrize("count", [3, 4, 8, 17])
def test_three_ways_agree(count):
    generator = seeded(count)
    for scale in (1.0, 1e-9, 1e9):
        rows = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        rows *= torch.logspace(-3, 3, count, dtype=torch.float64)[:, None] * scale
        rows[1] = 0
        rows[2] = -rows[0]
        gram = rows @ rows.T
        order = gk.PCGrad(generator=generator).draw(count)
        one, *others = [weights_by(way, gram, order) for way in WAYS]
        for other in others:
            torch.testing.assert_close(
                other, one, rtol=0, atol=2e-15 * count * float(one.abs().max())
            )


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_is_not_passed_over(way):
    rows = torch.randn(4, 6, generator=seeded(0), dtype=torch.float64)
    rows[2, 1] = torch.nan
    order = gk.PCGrad().draw(4)
    assert weights_by(way, rows @ rows.T, order).isnan().any()


def test_a_nan_is_not_passed_over_by_the_closed_form():
    gram = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    assert pcgrad_weights(gram).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_narrow_gram_matrices_are_worked_on_in_float64(dtype, count):
    rows = torch.randn(count, 6, generator=seeded(1), dtype=torch.float64)
    gram, order = (rows @ rows.T).to(dtype), gk.PCGrad().draw(count)
    found = pcgrad_weights(gram, order)
    assert found.dtype == dtype
    assert torch.equal(found, pcgrad_weights(gram.double(), order).to(dtype))
