"""What every ascent has: which parameters, scaling by weights, radii by group, several steps."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import as_users_run_it, flat
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gradkit as gk

ENGINES = ("inplace", "functional")
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3).sin()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    return nn.Sequential(*layers).double()


def loss(model: nn.Module) -> Tensor:
    return (model(X) - X[:, :2].roll(1, 0)).square().sum()


def gradient(model: nn.Module, at: Sequence[Tensor]) -> list[Tensor]:
    outputs = torch.func.functional_call(
        model, dict(zip(dict(model.named_parameters()), at, strict=True)), (X,)
    )
    return [*torch.autograd.grad((outputs - X[:, :2].roll(1, 0)).square().sum(), at)]


def points(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]


def step(
    transform: gk.Transform,
    engine: str,
    groups: Callable[[nn.Module], Any] | None = None,
    make: Callable[[], nn.Module] = network,
) -> Tensor:
    model = make()
    parameters = model.parameters() if groups is None else groups(model)
    base = torch.optim.SGD(parameters, lr=1.0)
    optimizer = gk.wrap(base, transform, model=model, engine=engine)
    start = flat(model.parameters())
    optimizer.step(lambda: loss(model))
    return start - flat(model.parameters())


def by_hand(
    sizes: Callable[[str, Tensor], Tensor | float],
    radii: Callable[[str], float],
    steps: int = 1,
    make: Callable[[], nn.Module] = network,
) -> Tensor:
    """The gradient at the end of an ascent with T = `sizes` and each parameter's own radius."""
    model = make()
    names = [name for name, _ in model.named_parameters()]
    at = points(model)
    for _ in range(steps):
        grads = gradient(model, at)
        scales = [sizes(name, w.detach()) for name, w in zip(names, at, strict=True)]
        norm = flat([g * t for g, t in zip(grads, scales, strict=True)]).norm()
        at = [
            (w + radii(name) / steps * t * t * g / norm).detach().requires_grad_()
            for name, w, g, t in zip(names, at, grads, scales, strict=True)
        ]
    return flat(gradient(model, at))


def is_norm(name: str) -> float:
    return float(name.startswith("1."))


SCALED: dict[str, tuple[gk.Transform, Callable[[str, Tensor], Any]]] = {
    "norm": (gk.SAM(rho=0.3, only="norm"), lambda name, w: is_norm(name)),
    "a predicate": (
        gk.SAM(rho=0.3, only=lambda name, parameter: parameter.dim() > 1),
        lambda name, w: float(w.dim() > 1),
    ),
    "weights": (
        gk.ASAM(rho=0.3, eta=0.1),
        lambda name, w: w.abs() + 0.1 if name.endswith("weight") else 1.0,
    ),
    "all": (gk.SAM(rho=0.3, adaptive="all", eta=0.0), lambda name, w: w.abs()),
    "weights of norms": (
        gk.SAM(rho=0.3, adaptive=True, only="norm"),
        lambda name, w: is_norm(name) * (w.abs() + 0.01 if "weight" in name else 1.0),
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", SCALED)
def test_which_parameters_and_how_they_are_scaled(kind, engine):
    transform, sizes = SCALED[kind]
    expected = by_hand(sizes, lambda name: 0.3)
    torch.testing.assert_close(step(transform, engine), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parametrised_weight_is_scaled_like_a_weight(engine: str) -> None:
    """Its parts are called 0.parametrizations.weight.original0 and original1."""

    def make() -> nn.Module:
        model = network()
        parametrizations.weight_norm(model[0])
        return model

    expected = by_hand(
        lambda name, w: w.abs() + 0.1 if "weight" in name else 1.0, lambda name: 0.3, make=make
    )
    found = step(gk.ASAM(rho=0.3, eta=0.1), engine, make=make)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_class_whose_name_merely_begins_like_a_norms_is_none() -> None:
    class NormalHead(nn.Linear):
        pass

    class OwnNorm2d(nn.Linear):
        pass

    for kind, works in ((OwnNorm2d, True), (NormalHead, False)):
        model = nn.Sequential(nn.Linear(3, 2), kind(2, 2)).double()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = gk.wrap(base, gk.SAM(only="norm"), model=model)
        refused = pytest.raises(ValueError, match="layers, and the optimizer has none")
        with contextlib.nullcontext() if works else refused:
            optimizer.step(lambda model=model: model(X).sum())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_radius_for_each_group(engine, steps):
    def groups(model: nn.Module) -> Any:
        first, *others = model.children()
        rest = [parameter for module in others for parameter in module.parameters()]
        return [{"params": first.parameters(), "rho": 0.05}, {"params": rest}]

    found = step(gk.SAM(rho=0.2, steps=steps), engine, groups)
    expected = by_hand(
        lambda name, w: 1.0, lambda name: 0.05 if name.startswith("0.") else 0.2, steps
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_schedule_writes_the_groups_and_is_saved():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.GSAM(rho=0.5), model=model)
    optimizer.param_groups[0]["rho"] = 0.0
    start = flat(model.parameters())
    grads = flat(gradient(model, points(model)))
    optimizer.step(lambda: loss(model))
    torch.testing.assert_close(flat(model.parameters()), start - 0.1 * grads)
    assert optimizer.state_dict()["param_groups"][0]["rho"] == 0.0


def test_sagm_scales_by_the_weights_themselves():
    """Not by those that its step back has led to."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = gk.wrap(
        torch.optim.SGD([weight], lr=1.0), gk.SAGM(rho=0.5, alpha=0.1, adaptive="all", eta=0.0)
    )
    w = weight.detach().clone()
    optimizer.step(lambda: weight.square().sum() / 2)
    there = w - 0.1 * w + 0.5 * w**3 / w.square().norm()
    torch.testing.assert_close(weight.grad, (w + there) / 2)


def test_in_a_chain_the_ascent_starts_at_the_point():
    """SAM around ASAM scales by the weights where the outer ascent has led."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    optimizer = gk.wrap(
        torch.optim.SGD([weight], lr=1.0),
        gk.SAM(rho=0.1, adaptive="all", eta=0.0),
        gk.SAM(rho=0.5),
    )
    start = weight.detach().clone()
    optimizer.step(lambda: weight.square().sum() / 2)

    def inner(w: Tensor) -> Tensor:
        return w + 0.1 * w.square() * w / w.square().norm()

    first = inner(start)
    second = inner(start + 0.5 * first / first.norm())
    torch.testing.assert_close(weight.detach(), start - second)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "rho": (lambda: gk.ASAM(rho=-1.0), "rho is -1.0"),
    "eta": (lambda: gk.SAM(eta=-0.1), "eta is -0.1; it must be at least 0"),
    "only": (lambda: gk.SAM(only="biases"), "only is 'biases'; pass 'norm', or a function"),
    "adaptive": (lambda: gk.SAM(adaptive="some"), "adaptive is 'some'; pass True, False"),
    "steps": (lambda: gk.SAM(steps=0), "steps is 0; it must be at least 1"),
    "one step": (lambda: gk.MSAM(steps=2), "the ascent of MSAM has one"),
    "k": (lambda: gk.LookSAM(k=0), "k is 0; it must be at least 1"),
    "lmbda": (lambda: gk.FriendlySAM(lmbda=1.0), "lmbda is 1.0; it must be"),
    "theta": (lambda: gk.VaSSO(theta=0.0), "theta is 0.0; it must be positive and at most 1"),
    "gamma": (lambda: gk.WSAM(gamma=1.0), "gamma is 1.0; it must be at least 0 and less"),
    "GAM": (lambda: gk.GAM(rho=0.0), "rho is 0; the gradient's norm is maximised"),
    "delta": (lambda: gk.AESAM(delta=1.0), "delta is 1.0; it must be"),
    "num_data": (lambda: gk.BSAM(0), "num_data is 0; it must be at least 1"),
    "damping": (lambda: gk.BSAM(9, damping=-0.1), "damping is -0.1; it must be at least 0"),
    "prior": (lambda: gk.BSAM(9, delta=-1.0), "delta is -1.0; it must be at least 0"),
    "alpha": (lambda: gk.SlowWeights(alpha=1.5), "alpha is 1.5; it must be positive"),
}


@pytest.mark.parametrize("what", WRONG)
def test_arguments_are_checked(what):
    make, message = WRONG[what]
    with as_users_run_it(), pytest.raises(ValueError, match=message):
        make()


def test_transforms_are_not_nested():
    for make in (gk.SAM, gk.LookSAM):
        with as_users_run_it(), pytest.raises(TypeError, match=r"gk\.wrap\(\) one after the other"):
            make(gk.PCGrad())


def test_a_function_must_choose_some_parameters():
    model = network()
    start = flat(model.parameters())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    choose = gk.SAM(only=lambda name, parameter: name.startswith("encoder."))
    for options in ({"model": model}, {}):
        optimizer = gk.wrap(base, choose, **options)
        with pytest.raises(ValueError, match=r"SAM\(only=\).* none .* as model="):
            optimizer.step(lambda: loss(model))
    assert torch.equal(flat(model.parameters()), start)


def test_norms_are_found_in_the_model():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.SAM(only="norm"))
    with pytest.raises(ValueError, match=r"pass model= to gk\.wrap"):
        optimizer.step(lambda: loss(model))
    plain = nn.Linear(3, 2).double()
    optimizer = gk.wrap(
        torch.optim.SGD(plain.parameters(), lr=0.1), gk.SAM(only="norm"), model=plain
    )
    with pytest.raises(ValueError, match=r"the optimizer has none; pass only= a function"):
        optimizer.step(lambda: loss(plain))


@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_msam_needs_a_momentum(base):
    model = network()
    optimizer = gk.wrap(base(model.parameters()), gk.MSAM(), model=model)
    with pytest.raises(ValueError, match=r"keeps none .*; use SGD with momentum > 0, or Adam"):
        optimizer.step(lambda: loss(model))


def test_msam_goes_along_adams_mean():
    model = network()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = gk.wrap(base, gk.MSAM(rho=0.5), model=model)
    optimizer.step(lambda: loss(model))
    at = points(model)
    v = flat([base.state[parameter]["exp_avg"] for parameter in model.parameters()])
    moved = (flat(at) - 0.5 * v / v.norm()).split([w.numel() for w in at])
    there = [m.view_as(w).requires_grad_() for m, w in zip(moved, at, strict=True)]
    expected = flat(gradient(model, there))
    optimizer.step(lambda: loss(model))
    found = flat([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4),
        lambda p: torch.optim.Adam(p, lr=0.1),
    ],
)
def test_bsam_takes_plain_sgd_only(base):
    model = network()
    optimizer = gk.wrap(base(model.parameters()), gk.BSAM(100), model=model)
    before = flat(model.parameters())
    with pytest.raises(ValueError, match=r"use torch\.optim\.SGD\(lr=\.\.\.\) alone"):
        optimizer.step(lambda: loss(model))
    assert torch.equal(flat(model.parameters()), before)


def test_options_are_shown_where_they_are_not_the_defaults():
    assert repr(gk.SAM(rho=0.1)) == "SAM(rho=0.1)"
    assert repr(gk.GSAM(adaptive="all")) == "GSAM(rho=0.05, adaptive='all', alpha=0.4)"
    assert repr(gk.ESAM()) == "ESAM(rho=0.05, beta=0.6, gamma=0.5)"  # without the generator


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (gk.AESAM, "all ranks climb in the same steps"),
        (gk.MSAM, "the momentum is that of all ranks"),
        (gk.WSAM, "what decouple=True adds must be alike on all ranks"),
    ],
    ids=["AESAM", "MSAM", "WSAM"],
)
def test_methods_that_ranks_take_alike_do_not_perturb_per_rank(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"sync_perturbation is False, but {why}"):
        make(sync_perturbation=False)
    assert gk.WSAM(decouple=False, sync_perturbation=False).per_rank
    assert repr(gk.SAM(sync_perturbation=False)) == "SAM(rho=0.05, sync_perturbation=False)"


def test_a_radius_of_0_costs_one_evaluation() -> None:
    model, calls = network(), 0

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return loss(model)

    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = gk.wrap(base, gk.SAM(rho=0.1), model=model)
    for rho, expected in ((0.0, 1), (0.1, 2)):  # a schedule that begins later
        optimizer.param_groups[0]["rho"], calls = rho, 0
        optimizer.step(counted)
        assert calls == expected


def test_on_one_process_it_makes_no_difference_who_perturbs() -> None:
    ends = []
    for together in (True, False):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        base = torch.optim.SGD([w], lr=0.1)
        optimizer = gk.wrap(base, gk.SAM(rho=0.5, sync_perturbation=together))
        optimizer.step(lambda: w.pow(4).sum())
        ends.append(w.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "make", [lambda: gk.GSAM(alpha=1e38), lambda: gk.CRSAM(gamma=1e38)], ids=["GSAM", "CRSAM"]
)
def test_a_combination_that_overflows_is_not_applied(make: Any) -> None:
    w = nn.Parameter(torch.tensor([30.0, 400.0]))
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.1), make())
    with pytest.raises(gk.NonFiniteError, match="the transforms' result is not finite"):
        optimizer.step(lambda: w[0] ** 2 + 3 * w[1].abs() ** 3)
    assert w.tolist() == [30.0, 400.0]


def wide() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 120), nn.Tanh(), nn.Linear(120, 150)).double()
    x = torch.randn(4, 160, dtype=torch.float64)
    return model, lambda: model(x).square().mean()


class Keeps(gk.Transform):
    """Keeps what the transforms before it have returned, and a copy of it."""

    def __init__(self) -> None:
        self.kept: list[tuple[gk.Gradients, Tensor]] = []

    def around(self, inner: Any, context: gk.Context) -> Any:
        def oracle(at: Any = None, only: Any = None) -> gk.Gradients:
            gradients = inner(at, only)
            parts = [part.clone() for part in gradients.storage.parts]
            self.kept.append((gradients, flat(parts)))
            return gradients

        return oracle


COMBINATIONS: dict[str, Callable[[], gk.Transform]] = {
    "SAGM": gk.SAGM,
    "GSAM": gk.GSAM,
    "CRSAM": gk.CRSAM,
    "WSAM": lambda: gk.WSAM(decouple=False),
    "LookSAM": lambda: gk.LookSAM(k=2),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_combination_takes_the_memory_of_a_gradient_that_nobody_keeps(make, engine):
    ends = []
    for keeps in (False, True):
        model, closure = wide()
        keeper, seen = Keeps(), Seen()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        transforms = (*([keeper] if keeps else []), make(), seen)
        optimizer = gk.wrap(base, *transforms, model=model, engine=engine)
        for _ in range(2):
            optimizer.step(closure)
        for gradients, before in keeper.kept:  # whoever keeps gradients keeps their values
            torch.testing.assert_close(gradients.rows[0], before, rtol=0, atol=0)
        assert seen.updates
        for update, grads in seen.updates:
            assert torch.equal(update, flat(grads))
        weight = next(model.parameters())
        assert weight.grad is not None
        alone = weight.grad.untyped_storage().nbytes() == weight.numel() * 8
        assert alone != keeps  # else it is part of a flat vector
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-13, atol=0)


class Seen(gk.Transform):
    """Reads the direction once it has been applied, when it may lie in a gradient's memory."""

    def __init__(self) -> None:
        self.updates: list[tuple[Tensor, list[Tensor]]] = []

    def after_step(self, context: gk.Context) -> None:
        gradients = context.gradients
        assert gradients is not None
        grads = [parameter.grad.clone() for parameter in context.layout.parameters]
        self.updates.append((gradients.direction().clone(), grads))
        assert gradients.gram().isfinite().all()


def test_a_gradient_that_has_gone_into_the_direction_is_not_shown():
    class Reads(gk.Transform):
        def after_step(self, context: gk.Context) -> None:
            rows.append(lambda: context.gradients.rows)

    rows: list[Callable[[], Tensor]] = []
    model, closure = wide()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gk.wrap(base, gk.LookSAM(k=2), Reads(), model=model)
    for _ in range(2):
        optimizer.step(closure)
    assert rows[0]().isfinite().all()  # a step of SAM, whose direction is the gradient
    with pytest.raises(RuntimeError, match="gone into the direction of the step"):
        rows[1]()
    assert optimizer.last_step.gram.isfinite().all()


@pytest.mark.parametrize("make", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_combination_is_clipped(make):
    directions = []
    for max_norm in (None, 1e-3):
        model, closure = wide()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = gk.wrap(base, make(), model=model, max_norm=max_norm)
        optimizer.step(closure)
        directions.append(flat(parameter.grad for parameter in model.parameters()))
    whole, clipped = directions
    torch.testing.assert_close(clipped, whole * (1e-3 / (whole.norm() + 1e-6)))


def test_looksam_notices_another_orthogonal_vector():
    w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    looksam = gk.LookSAM(rho=5**0.5, k=3, alpha=0.25)
    optimizer = gk.wrap(torch.optim.SGD([w], lr=0.0), looksam)

    def update() -> Tensor:
        optimizer.step(lambda: w[0] ** 2 / 2 + w[1] ** 2)
        assert w.grad is not None
        return w.grad - torch.tensor([1.0, 2.0], dtype=torch.float64)  # g

    def expected(vector: Tensor) -> Tensor:
        return 0.25 * 5**0.5 * vector / vector.norm()

    update()
    state = copy.deepcopy(optimizer.state_dict())
    torch.testing.assert_close(update(), expected(torch.tensor([-2.0, 1.0]).double()))
    other = torch.tensor([3.0, 40.0], dtype=torch.float64)
    looksam.vectors["orthogonal"] = other
    torch.testing.assert_close(update(), expected(other))
    for saved in (state, copy.deepcopy(state)):
        for vectors in saved["state"].values():
            for key, each in vectors.items():
                if "orthogonal" in str(key):
                    each.mul_(torch.tensor([5.0, 0.0]).double())
        optimizer.load_state_dict(saved)
        torch.testing.assert_close(update(), expected(torch.tensor([-1.0, 0.0]).double()))
