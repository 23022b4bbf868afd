"""The sharpness report against dense Hessians, a quadratic, and what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import as_users_run_it, flat, seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gradkit as gk
from gradkit.sharpness.mean_loss import MeanLoss

X = torch.randn(9, 1, 6, 6, generator=seeded(0), dtype=torch.float64)
Y = torch.arange(9) % 3


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), *extra, nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3),
    )  # fmt: skip
    model = nn.Sequential(*layers).double()
    model[1].running_var.uniform_(0.5, 2)
    return model


def objective_on(model: nn.Module, part: slice = slice(None)) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X[part]), Y[part])


def dense(model: nn.Module, names: Sequence[str], part: slice = slice(None)) -> Tensor:
    """The whole Hessian over the named parameters, by torch's own function."""
    parameters = dict(model.named_parameters())
    shapes = [parameters[name].shape for name in names]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        outputs = torch.func.functional_call(model, {**values, **buffers}, (X[part],))
        return F.cross_entropy(outputs, Y[part])

    start = flat(parameters[name] for name in names)
    return torch.autograd.functional.hessian(loss, start)


def top(matrix: Tensor, count: int) -> Any:
    return pytest.approx(torch.linalg.eigvalsh(matrix).flip(0)[:count].tolist(), rel=1e-7)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_products_and_eigenvalues_equal_those_of_the_dense_hessian(
    training: bool, mode: Any
) -> None:
    model = network().train(training)
    names = [name for name, _ in model.named_parameters()]
    hessian = dense(model, names)
    loss = MeanLoss([objective_on(model)], model, dict(model.named_parameters()))
    loss.mode = mode
    vector = torch.randn(len(hessian), generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(loss.product(vector), hessian @ vector, rtol=1e-9, atol=1e-11)
    assert loss.mode == mode
    found = gk.sharpness.report(
        objective_on(model), model, eigenvalues=3, iterations=len(hessian), tolerance=1e-8
    )
    assert found.eigenvalues == top(hessian, 3)
    assert (found.mode, found.parameters) == ("forward", len(hessian))
    assert found.trace is not None
    assert found.trace_error is not None
    assert abs(found.trace - float(hessian.trace())) < 4 * found.trace_error


def test_several_batches_are_averaged() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    parts = (slice(0, 4), slice(4, 9))
    mean = (dense(model, names, parts[0]) + dense(model, names, parts[1])) / 2
    found = gk.sharpness.report(
        [objective_on(model, part) for part in parts], model, iterations=99, tolerance=1e-8
    )
    assert found.eigenvalues == top(mean, 1)
    losses = [objective_on(model, part)().item() for part in parts]
    assert found.loss == pytest.approx(sum(losses) / 2, rel=1e-12)
    slopes = [
        torch.autograd.grad(objective_on(model, part)(), model.parameters()) for part in parts
    ]
    mean_slope = (flat(slopes[0]) + flat(slopes[1])) / 2
    assert found.gradient_norm == pytest.approx(float(mean_slope.norm()), rel=1e-9)


@pytest.mark.parametrize("only", ["norm", "predicate"])
def test_some_of_the_parameters(only: str) -> None:
    model = network()
    names = {
        "norm": ["1.weight", "1.bias", "6.weight", "6.bias"],
        "predicate": ["8.weight", "8.bias"],
    }[only]
    model[0].requires_grad_(False)
    choice: Any = "norm" if only == "norm" else lambda name, p: name[0] in "08"
    found = gk.sharpness.report(
        objective_on(model), model, only=choice, iterations=99, tolerance=1e-8
    )
    hessian = dense(model, names)
    assert found.parameters == len(hessian)
    assert found.eigenvalues == top(hessian, 1)
    grads = torch.autograd.grad(
        objective_on(model)(), [dict(model.named_parameters())[n] for n in names]
    )
    assert found.gradient_norm == pytest.approx(float(flat(grads).norm()), rel=1e-9)


class Quadratic(nn.Module):
    """½·(w − c)·A·(w − c) with eigenvalues 1, 2, 6."""

    def __init__(self, centre: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        super().__init__()
        draw = torch.randn(3, 3, generator=seeded(4), dtype=torch.float64)
        basis, _ = torch.linalg.qr(draw)
        self.matrix = basis @ torch.diag(torch.tensor([1.0, 2.0, 6.0]).double()) @ basis.T
        self.centre = torch.tensor(centre, dtype=torch.float64)
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self) -> Tensor:
        away = self.w - self.centre
        return away @ self.matrix @ away / 2


def test_a_quadratic_at_its_minimum() -> None:
    """The gradient is 0: only the eigenvector leads uphill, by ½ρ²λ."""
    model = Quadratic()
    found = gk.sharpness.report(model, model, rho=0.3, eigenvalues=3, trace_samples=400)
    assert found.eigenvalues == pytest.approx([6, 2, 1])
    assert found.sharpness == pytest.approx(0.5 * 0.3**2 * 6)
    assert (found.loss, found.gradient_norm, found.first_order) == (0, 0, 0)
    assert found.trace_error is not None
    assert found.trace == pytest.approx(9, abs=4 * found.trace_error)


def test_a_quadratic_beside_its_minimum() -> None:
    model = Quadratic((0.4, -0.2, 0.3))
    found = gk.sharpness.report(model, model, rho=0.5, steps=40)
    away = -model.centre
    gradient = model.matrix @ away
    rise = 0.5 * gradient / gradient.norm()
    first = rise @ gradient + rise @ model.matrix @ rise / 2
    assert found.first_order == pytest.approx(float(first))
    circle = torch.nn.functional.normalize(
        torch.randn(200_000, 3, generator=seeded(0), dtype=torch.float64)
    )
    inside = 0.5 * circle
    rises = inside @ gradient + ((inside @ model.matrix) * inside).sum(1) / 2
    assert found.sharpness == pytest.approx(float(rises.max()), rel=1e-4)
    assert found.sharpness > found.first_order * 1.0001
    few = gk.sharpness.report(model, model, rho=0.5, steps=0, eigenvalues=0, trace_samples=0)
    assert few.sharpness == few.first_order == found.first_order
    assert (few.eigenvalues, few.trace, few.trace_error) == ((), None, None)


def test_the_ascent_stays_in_the_ball_and_is_never_below_zero() -> None:
    """A concave loss at its maximum has no rise; a linear one has ρ·‖g‖ at most."""
    flat_top = nn.ParameterList([torch.zeros(4, dtype=torch.float64)])
    found = gk.sharpness.report(lambda: -flat_top[0].square().sum(), flat_top, rho=2.0)
    assert found.sharpness == 0
    assert found.eigenvalues == pytest.approx([-2])
    slope = torch.tensor([3.0, 4.0], dtype=torch.float64)
    line = nn.ParameterList([torch.zeros(2, dtype=torch.float64)])
    found = gk.sharpness.report(lambda: slope @ line[0], line, rho=0.1, steps=5)
    assert found.sharpness == pytest.approx(0.5)
    assert found.eigenvalues == (0.0,)


def test_a_loss_that_is_not_a_number_nearby_is_an_infinite_rise() -> None:
    w = nn.ParameterList([torch.tensor([0.1], dtype=torch.float64)])
    found = gk.sharpness.report(lambda: -w[0].sqrt().sum(), w, rho=0.2)
    assert (found.sharpness, found.first_order) == (math.inf, math.inf)


def test_with_neither_gradient_nor_eigenvector_a_random_direction_is_tried() -> None:
    model = Quadratic()
    found = gk.sharpness.report(model, model, rho=0.3, eigenvalues=0, steps=30)
    assert found.sharpness == pytest.approx(0.5 * 0.3**2 * 6, rel=1e-6)


class _Square(torch.autograd.Function):
    """A square without a formula for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_without_a_formula_for_forward_mode_it_goes_backwards() -> None:
    w = nn.ParameterList([torch.tensor([1.0, 2.0], dtype=torch.float64)])
    found = gk.sharpness.report(lambda: (_Square.apply(w[0]) ** 2).sum(), w, eigenvalues=2)
    assert found.mode == "reverse"
    assert found.eigenvalues == pytest.approx([48, 12])  # of w⁴: 12 w²


def test_checkpointing_goes_backwards_to_the_same_numbers() -> None:
    model = network()
    plain = gk.sharpness.report(objective_on(model), model)
    found = gk.sharpness.report(
        lambda: F.cross_entropy(
            model[3:](checkpoint(model[:3], X, use_reentrant=False)), Y
        ),
        model,
    )  # fmt: skip
    assert (plain.mode, found.mode) == ("forward", "reverse")
    assert found.eigenvalues == pytest.approx(plain.eigenvalues, rel=1e-9)
    assert found.sharpness == pytest.approx(plain.sharpness, rel=1e-9)


def test_what_cannot_be_differentiated_twice_says_so() -> None:
    w = nn.ParameterList([torch.randn(1, 2, 16, 8, generator=seeded(0))])

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(w[0], w[0], w[0]).square().sum()

    def unfused() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return fused()

    with pytest.raises(RuntimeError, match=r"an objective cannot be differentiated twice: .*MATH"):
        gk.sharpness.report(fused, w)
    # Without products with the Hessian it can be measured, and as the message says it can be, too.
    without = gk.sharpness.report(fused, w, eigenvalues=0, trace_samples=0)
    assert without.first_order == pytest.approx(
        gk.sharpness.report(unfused, w).first_order, rel=1e-3
    )


def test_nothing_is_changed() -> None:
    model = network(nn.Dropout(0.4))
    model[0].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    values = [grad.clone() for grad in grads]
    parameters = list(model.parameters())
    buffers = list(model.buffers())
    before = gk.testing.bits(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()

    def objective() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        model[6].eval()
        return F.cross_entropy(model(X), Y)

    gk.sharpness.report(objective, model)
    assert gk.testing.bits(model.state_dict()) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)
    with pytest.raises(ZeroDivisionError):
        gk.sharpness.report(lambda: model(X).sum() / 0 + 1 // 0, model)
    assert gk.testing.bits(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [parameter.grad for parameter in model.parameters()] == grads


def test_dropout_draws_the_same_masks_in_every_evaluation() -> None:
    """Otherwise the differences of two losses would be those of their masks."""
    model = network(nn.Dropout(0.5))
    first = gk.sharpness.report(objective_on(model), model, rho=1e-6)
    assert first.first_order == pytest.approx(1e-6 * first.gradient_norm, rel=1e-3)
    assert gk.sharpness.report(objective_on(model), model, rho=1e-6) == first
    loss = MeanLoss([objective_on(model)], model, dict(model.named_parameters()))
    vector = torch.ones(loss.layout.numel, dtype=torch.float64)
    with loss.protected():
        once = loss.product(vector)
        assert torch.equal(once, loss.product(vector))
        ahead, behind = (loss.gradient(loss.displaced(by * vector))[1] for by in (1e-5, -1e-5))
    torch.testing.assert_close((ahead - behind) / 2e-5, once, rtol=1e-6, atol=1e-6)
    torch.manual_seed(5)
    assert gk.sharpness.report(objective_on(model), model, rho=1e-6) != first


def test_it_is_deterministic_by_its_generator() -> None:
    model = network()
    first, second, other = (
        gk.sharpness.report(objective_on(model), model, iterations=4, generator=seeded(seed))
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first.trace != other.trace


def test_tied_weights_and_float32_and_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(8, 4, generator=seeded(0))
    found = gk.sharpness.report(
        lambda: (model(x) - x).square().sum(), model, iterations=16, tolerance=1e-4
    )

    def loss(weight: Tensor) -> Tensor:
        return (torch.tanh(x.double() @ weight.T) @ weight.T - x.double()).square().sum()

    weight = model[0].weight.detach().double()
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(16, 16)
    assert found.parameters == 16
    assert found.eigenvalues == pytest.approx(
        torch.linalg.eigvalsh(hessian)[-1:].tolist(), rel=1e-4
    )
    wide = network().to(memory_format=torch.channels_last)
    plain = network()
    assert gk.sharpness.report(objective_on(wide), wide).eigenvalues == pytest.approx(
        gk.sharpness.report(objective_on(plain), plain).eigenvalues, rel=1e-6
    )


WRONG: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "rho": (lambda m: gk.sharpness.report(m, m, rho=0.0), ValueError, "rho is 0.0; it must be pos"),
    "steps": (lambda m: gk.sharpness.report(m, m, steps=-1), ValueError, "steps is -1"),
    "samples": (lambda m: gk.sharpness.report(m, m, trace_samples=1), ValueError, "at least 2"),
    "too many": (
        lambda m: gk.sharpness.report(m, m, eigenvalues=4),
        ValueError,
        "eigenvalues is 4; the parameters measured have 3",
    ),
    "too few": (
        lambda m: gk.sharpness.report(m, m, eigenvalues=3, iterations=2),
        ValueError,
        "iterations is 2; 3 eigenvalues take at least as many",
    ),
    "only": (lambda m: gk.sharpness.report(m, m, only="bias"), ValueError, "only is 'bias'; pass"),
    "none": (lambda m: gk.sharpness.report(m, m, only="norm"), ValueError, "is left; pass another"),
    "empty": (lambda m: gk.sharpness.report([], m), TypeError, r"objective is \[\]; pass"),
    "a loss": (lambda m: gk.sharpness.report(m(), m), TypeError, "objective is tensor.*pass"),
    "a list": (lambda m: gk.sharpness.report([3], m), TypeError, "objective 0 is 3; pass"),
    "mapping": (lambda m: gk.sharpness.report({"a": m}, m), TypeError, "or a list of them"),
    "None": (lambda m: gk.sharpness.report(lambda: None, m), TypeError, "returned a NoneType"),
    "shape": (lambda m: gk.sharpness.report(lambda: m.w * 2, m), ValueError, r"shape \(3,\)"),
    "nan": (
        lambda m: gk.sharpness.report(lambda: m() * math.nan, m),
        ValueError,
        "the loss is nan",
    ),
    "no curvature": (
        lambda m: gk.sharpness.report(lambda: m.w.abs().pow(1.5).sum(), m),
        ValueError,
        "a product with the Hessian is not finite",
    ),
    "backward": (
        lambda m: gk.sharpness.report(lambda: (loss := m(), loss.backward())[0], m),
        RuntimeError,
        "an objective has called backward; return the loss alone",
    ),
    "detached": (
        lambda m: gk.sharpness.report(lambda: m().detach(), m),
        RuntimeError,
        "does not depend on the parameters that are measured",
    ),
    "beforehand": (
        lambda m: (lambda loss: gk.sharpness.report(lambda: loss, m))(m()),
        RuntimeError,
        "uses the parameter 'w' by a reference made outside",
    ),
    "reference": (
        lambda m: (lambda w: gk.sharpness.report(lambda: m() + w.sum(), m))(m.w),
        RuntimeError,
        "uses the parameter 'w' by a reference made outside",
    ),
    "scripted": (
        lambda m: gk.sharpness.report(m, nn.Sequential(m, torch.jit.ScriptModule())),
        ValueError,
        "holds a .*Script.*; pass the plain module",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(what: str) -> None:
    call, kind, message = WRONG[what]
    model = Quadratic()
    with as_users_run_it(), pytest.raises(kind, match=message):
        call(model)
    assert model.w.grad is None


def test_the_report_is_readable() -> None:
    model = Quadratic((1.0, 0.0, 0.0))
    text = repr(gk.sharpness.report(model, model, rho=0.5, eigenvalues=2))
    lines = [line.split()[0] for line in text.split("\n")]
    assert lines == ["SharpnessReport", "loss", "gradient", "sharpness", "eigenvalues", "Hessian"]
    assert "6 ± " in text
