import math

import pytest
import torch
from helpers import linear_objectives, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradkit as gk
from gradkit.alignment.cosine_lr import ACTIVATIONS

CLOSED_FORMS = {
    "quadratic": lambda c: (c + 1) ** 2 / 4,
    "linear": lambda c: (c + 1) / 2,
    "sigmoid": lambda c: 1 / (1 + math.exp(-c)),
    "relu": lambda c: max(0.0, c),
    "softplus": lambda c: math.log(1 + math.exp(c)),
    "constant": lambda c: 1.0,
}


def at_cosine(c):
    """Two gradients of lengths 2 and 5 at the angle arccos(c)."""
    second = (5 * c, 5 * math.sqrt(1 - c * c))
    return torch.tensor([(2.0, 0.0), second], dtype=torch.float64)


def step(rows, *transforms, lr=0.1, **options):
    w = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=lr), *transforms, **options)
    optimizer.step(linear_objectives([w], rows))
    return w.detach(), optimizer


def test_every_activation_is_tested():
    assert set(CLOSED_FORMS) == set(ACTIVATIONS)


@settings(deadline=None)
@given(st.floats(-1, 1), st.sampled_from(sorted(CLOSED_FORMS)))
def test_the_factor_is_the_closed_form_of_the_cosine(c, activation):
    rows = at_cosine(c)
    w, optimizer = step(rows, gk.CosineLR("a", "b", activation))
    factor = CLOSED_FORMS[activation](c)
    assert float(optimizer.last_step.lr_scale) == pytest.approx(factor, abs=1e-12)
    torch.testing.assert_close(w, -0.1 * factor * rows.sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", sorted(CLOSED_FORMS))
def test_the_ends_and_the_middle(activation):
    values = {
        "quadratic": (0.0, 0.25, 1.0),
        "linear": (0.0, 0.5, 1.0),
        "sigmoid": (0.26894142, 0.5, 0.73105858),
        "relu": (0.0, 0.0, 1.0),
        "softplus": (0.31326169, 0.69314718, 1.31326169),
        "constant": (1.0, 1.0, 1.0),
    }
    for c, expected in zip((-1.0, 0.0, 1.0), values[activation], strict=True):
        _, optimizer = step(at_cosine(c), gk.CosineLR("a", "b", activation))
        assert float(optimizer.last_step.lr_scale) == pytest.approx(expected, abs=1e-8)


@settings(deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=5).filter(lambda g: max(map(abs, g)) > 1e-3),
    st.floats(1e-3, 1e3),
    st.sampled_from(["quadratic", "linear"]),
)
def test_aligned_gradients_keep_the_rate_and_opposite_ones_stop(gradient, factor, activation):
    gradient = torch.tensor(gradient, dtype=torch.float64)
    for sign in (1.0, -1.0):
        rows = torch.stack([gradient, sign * factor * gradient])
        _, optimizer = step(rows, gk.CosineLR("a", "b", activation))
        scale = float(optimizer.last_step.lr_scale)
        assert 0.0 <= scale <= 1.0
        assert scale == pytest.approx(max(sign, 0.0), abs=1e-14)


def test_opposite_gradients_move_nothing():
    gradient = torch.tensor([3.0, 4.0])
    for activation in ("quadratic", "linear", "relu"):
        w, _ = step(torch.stack([gradient, -2 * gradient]), gk.CosineLR("a", "b", activation))
        assert w.tolist() == [0.0, 0.0]


def test_a_zero_gradient_has_cosine_zero():
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    _, optimizer = step(rows, gk.CosineLR("a", "b"))
    assert float(optimizer.last_step.lr_scale) == 0.25


def test_a_callable():
    w, optimizer = step(at_cosine(0.5), gk.CosineLR("a", "b", lambda c: 3 * c + 1))
    assert float(optimizer.last_step.lr_scale) == pytest.approx(2.5)
    torch.testing.assert_close(w, -0.25 * at_cosine(0.5).sum(0))


def test_factors_multiply():
    _, optimizer = step(
        at_cosine(0.5), gk.CosineLR("a", "b", "linear"), gk.CosineLR("b", "a", "quadratic")
    )
    assert float(optimizer.last_step.lr_scale) == pytest.approx(0.75 * 1.5**2 / 4)


def test_every_group_is_scaled_and_put_back():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5)
    groups = [{"params": [first]}, {"params": [second], "lr": rate}]
    optimizer = gk.wrap(torch.optim.SGD(groups, lr=0.1), gk.CosineLR("a", "b"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for expected in ((-0.025, -0.125), (-0.0375, -0.1875), (-0.04375, -0.21875)):
        optimizer.step(linear_objectives([first, second], rows))
        assert (first.item(), second.item()) == pytest.approx(expected)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert optimizer.param_groups[1]["lr"] is rate
    assert rate.item() == pytest.approx(0.5 / 8)


@pytest.mark.parametrize("group_scale", [1.0, 1e-12, 1e12])
def test_the_cosine_does_not_depend_on_the_lengths(group_scale):
    rows = at_cosine(0.3)
    rows[1] *= group_scale
    _, optimizer = step(rows, gk.CosineLR("a", "b", "linear"))
    assert float(optimizer.last_step.lr_scale) == pytest.approx(0.65, abs=1e-12)


def test_it_is_one_cosine_over_the_whole_vector():
    """Two tensors whose own cosines are 1 and −1 do not average to 0 if their lengths differ."""
    rows = torch.tensor([[2.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = gk.wrap(torch.optim.SGD(parameters, lr=0.1), gk.CosineLR("a", "b", "linear"))
    optimizer.step(linear_objectives(parameters, rows))
    assert float(optimizer.last_step.lr_scale) == pytest.approx((1 + 3 / 5) / 2)


def test_the_gradients_direction_is_left_alone():
    rows = torch.randn(2, 6, generator=seeded(0), dtype=torch.float64)
    w, optimizer = step(rows, gk.PCGrad(), gk.CosineLR("a", "b"), lr=1.0)
    scale = optimizer.last_step.lr_scale
    torch.testing.assert_close(w, -scale * gk.PCGrad()(rows))


def test_errors():
    message = "activation is 'cubic'; choose one of quadratic, linear, sigmoid, relu, softplus"
    with pytest.raises(ValueError, match=message):
        gk.CosineLR(activation="cubic")
    with pytest.raises(ValueError, match=r"CosineLR needs the objective 'c', but the step has 'a'"):
        step(at_cosine(0.5), gk.CosineLR("a", "c"))
