import math

import pytest
import torch
from helpers import CONFLICT, Observed, as_users_run_it, jacobians, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd.aggregation import GradVac as TorchjdGradVac

import gradkit as gk
from gradkit.surgery.gradvac import gradvac_weights
from surgery.rule_steps import check_resumes, gradients, in_blocks, step_with


def cosine(a, b):
    lengths = float(a.norm() * b.norm())
    return float(torch.dot(a, b)) / lengths if lengths > 0 else 0.0


class Reference:
    """The algorithm of Wang et al., vector by vector."""

    def __init__(self, count, beta=0.5):
        self.beta = beta
        self.targets = [[0.0] * count for _ in range(count)]

    def __call__(self, jacobian, order=None):
        total = torch.zeros_like(jacobian[0])
        for i, gradient in enumerate(jacobian):
            moved = gradient.clone()
            for j in range(len(jacobian)) if order is None else order[i].tolist():
                if j == i:
                    continue
                other = jacobian[j]
                phi, target = cosine(moved, other), self.targets[i][j]
                if phi < target and float(other.norm()) > 0:
                    # Of the multiples of g_j, the one that turns g'_i by the angle that is wanted.
                    across = moved - torch.dot(moved, other) / other.square().sum() * other
                    along = float(across.norm()) * target / math.sqrt(1 - target**2)
                    moved = across + along * other / other.norm()
                self.targets[i][j] = (1 - self.beta) * target + self.beta * phi
            total += moved
        return total


def order_of(seed, count, steps=1):
    """The orders that a rule with a generator of this seed draws."""
    rule = gk.GradVac(generator=seeded(seed))
    drawn = [rule.draw(count) for _ in range(steps)]
    return drawn[0] if steps == 1 else drawn


def test_the_value_of_the_table():
    rule = gk.GradVac()
    assert rule(torch.tensor(CONFLICT)).tolist() == pytest.approx(
        (0.5848, 3.8012, 3.8012), abs=5e-5
    )
    assert rule.state["targets"][0, 1].item() == pytest.approx(-0.8412 / 2, abs=5e-5)
    assert rule.state["targets"].diagonal().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 0.9])
def test_gradvac_is_the_algorithm_over_several_steps(count, beta):
    rule = gk.GradVac(beta=beta, generator=seeded(3))
    reference = Reference(count, beta)
    orders = order_of(3, count, 12)
    for jacobian, order in zip(gradients(12, count, count), orders, strict=True):
        expected = reference(jacobian, order)
        assert relative_error(rule(jacobian), expected) < 1e-10
        targets = torch.tensor(reference.targets, dtype=torch.float64)
        torch.testing.assert_close(rule.state["targets"], targets, rtol=0, atol=1e-10)


def test_gradvac_of_two_equals_torchjds():
    """Twenty courses of ten steps, each with targets of its own."""
    theirs, ours = [TorchjdGradVac() for _ in range(20)], gk.GradVac()
    for rows in torch.stack(list(gradients(200, 2, 2))).split(20):
        weights = ours.weights(rows @ rows.mT)
        for k, jacobian in enumerate(rows):
            # TorchJD adds 1e-8 to denominators.
            assert relative_error(weights[k] @ jacobian, theirs[k](jacobian)) < 1e-5


@settings(deadline=None, max_examples=30)
@given(jacobians(1, 5), st.integers(0, 99))
def test_without_memory_gradvac_is_pcgrad(jacobian, seed):
    expected = gk.PCGrad(generator=seeded(seed))(jacobian)
    rule = gk.GradVac(beta=0.0, generator=seeded(seed))
    scale = float(jacobian.abs().max()) + 1
    for _ in range(2):
        rule.generator.manual_seed(seed)
        # Where a projection leaves nothing, PCGrad goes on with the sign of what rounding left.
        assert float((rule(jacobian) - expected).abs().max()) < 1e-6 * scale
    assert not rule.state["targets"].any()


@settings(deadline=None, max_examples=30)
@given(jacobians(2, 2), st.floats(-0.9, 0.99))
def test_corrected_gradients_reach_their_targets(jacobian, target):
    targets = torch.full((2, 2), target, dtype=torch.float64)
    gram = jacobian @ jacobian.T
    weights, moved = gradvac_weights(gram, targets, 0.5)
    before = cosine(*jacobian)
    if min(jacobian.norm(dim=1)) > 0 and abs(before) < 0.999:
        # The weights add up both corrected gradients: g_1 + w_1·g_2 and g_2 + w_2·g_1.
        added = weights - 1
        assert (added >= 0).all()
        for i in range(2):
            corrected = jacobian[i] + added[1 - i] * jacobian[1 - i]
            assert cosine(corrected, jacobian[1 - i]) == pytest.approx(
                max(before, target), abs=1e-9
            )
    assert moved[0, 1].item() == pytest.approx((target + before) / 2, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(jacobians(1, 6), st.sampled_from([1e-12, 1e-4, 1.0, 1e12]))
def test_degenerate_gradients_stay_finite_and_scale(jacobian, scale):
    one, other = gk.GradVac(beta=1.0), gk.GradVac(beta=1.0)
    for _ in range(2):
        plain = one(jacobian)
        scaled = other(scale * jacobian) / scale
        assert plain.isfinite().all()
        largest = float(jacobian.abs().max()) + 1
        assert float((plain - scaled).abs().max()) <= 1e-4 * largest
        assert one.state["targets"].abs().max() <= 1


def test_equal_gradients_are_left_alone_for_ever():
    rule = gk.GradVac()
    jacobian = torch.tensor([[0.3, -1.7, 0.9]]).double().expand(3, -1).clone()
    for _ in range(56):
        torch.testing.assert_close(rule(jacobian), 3 * jacobian[0])
    # Their targets are 1 to all digits now; what no longer agrees is corrected by a finite step.
    assert rule.state["targets"][0, 1] == 1
    turned = torch.eye(3, dtype=torch.float64)
    assert rule(turned).isfinite().all()


def test_zero_and_opposite_gradients():
    zero = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    rule = gk.GradVac()
    rule.weights(torch.ones(2, 2, dtype=torch.float64))  # a target of 1/2
    assert rule(zero).tolist() == [1.0, 2.0]
    assert rule.state["targets"][0, 1] == 0.25
    opposite = torch.tensor([[1.0, 2.0], [-2.0, -4.0]], dtype=torch.float64)
    torch.testing.assert_close(gk.GradVac()(opposite), torch.zeros(2, dtype=torch.float64))
    assert gk.GradVac().weights(torch.zeros(1, 1)).tolist() == [1.0]


def test_batches_have_targets_of_their_own():
    rows = torch.randn(2, 3, 4, 6, generator=seeded(0), dtype=torch.float64)
    batch = gk.GradVac(generator=seeded(1))
    alone = [[gk.GradVac(generator=seeded(1)) for _ in range(3)] for _ in range(2)]
    for _ in range(3):
        weights = batch.weights(rows @ rows.mT)
        for i in range(2):
            for j in range(3):
                expected = alone[i][j].weights(rows[i, j] @ rows[i, j].T)
                torch.testing.assert_close(weights[i, j], expected)
        rows = rows.flip(0) + rows.roll(1, 2)


def test_nan_gives_nan_and_is_not_remembered():
    rule = gk.GradVac()
    grams = torch.tensor([[18.0, -22.0], [-22.0, 38.0]]).double().repeat(2, 1, 1)
    rule.weights(grams)
    before = rule.state["targets"].clone()
    grams[0, 0, 1] = torch.nan
    weights = rule.weigh_alone(grams)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()
    assert torch.equal(rule.state["targets"][0], before[0])
    assert not torch.equal(rule.state["targets"][1], before[1])


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_gradvac_in_steps_by_block(scope):
    """Each block has its own targets, which are kept from step to step."""
    names = {"global": 1, "group": 2, "tensor": 4}
    rule = gk.GradVac(scope=scope, generator=seeded(2))
    references = [Reference(3) for _ in range(names[scope])]
    orders = order_of(2, 3, 4)
    generator = seeded(7)
    for order in orders:
        rows = torch.randn(3, 10, generator=generator, dtype=torch.float64)
        direction, _ = step_with(rows, rule)
        each = iter(references)
        expected = in_blocks(rows, scope, lambda part: next(each)(part, order))
        torch.testing.assert_close(direction, expected)


def test_observers_keep_their_targets():
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    rule = gk.GradVac()
    step_with(rows, rule)
    before = rule.state["targets"].clone()
    direction, _ = step_with(rows, Observed("b"), rule)
    after = rule.state["targets"]
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[:, 1], before[:, 1])
    expected, _ = gradvac_weights(rows[::2] @ rows[::2].T, before[::2, ::2], 0.5)
    torch.testing.assert_close(direction, expected @ rows[::2])


def test_sam_moves_targets_once_a_step():
    rows = torch.randn(3, 10, generator=seeded(0), dtype=torch.float64)
    rule, alone = gk.GradVac(generator=seeded(1)), gk.GradVac(generator=seeded(1))
    for _ in range(3):
        direction, _ = step_with(rows, rule, gk.SAM())
        torch.testing.assert_close(direction, alone(rows))
    torch.testing.assert_close(rule.state["targets"], alone.state["targets"])


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_gradvac_resumes(scope):
    check_resumes(lambda: gk.GradVac(scope=scope))


def test_arguments_are_checked():
    with as_users_run_it():
        for beta in (-0.1, 1.5):
            with pytest.raises(ValueError, match=f"beta is {beta}; it must be between"):
                gk.GradVac(beta=beta)
        with pytest.raises(TypeError, match="beta is '1'"):
            gk.GradVac(beta="1")
        with pytest.raises(ValueError, match="scope is 'layer'"):
            gk.GradVac(scope="layer")
    with pytest.raises(ValueError, match="with 3 objectives the result depends on their order"):
        gradvac_weights(torch.eye(3), torch.zeros(3, 3), 0.5)
