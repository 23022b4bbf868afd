"""What holds of every rule by Gram matrix, alone."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import re
from itertools import chain, compress

import pytest
import torch
from helpers import as_users_run_it
from torch.utils._python_dispatch import TorchDispatchMode

import gradkit as gk
from surgery.methods import GRAM, METHODS, alone, made, matrices, normal, weights
from surgery.table import EXPORTED, RULES, defined, entry, exported, losses


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions inside functions would be decorated anew in each call, at most of all the time."""
    monkeypatch.setattr("jaxtyping.jaxtyped", lambda *, typechecker: lambda function: function)


every_rule = pytest.mark.parametrize("name", GRAM)
FACTORS = (1e-6, 1e-3, 3.0, 1e3, 1e6)


def stacked(count: int) -> tuple[list[str], torch.Tensor]:
    """The names of the matrices, and all of them [B, K, P]."""
    bank = matrices(count)
    return list(bank), torch.stack([*bank.values()])


def products(jacobians: torch.Tensor) -> torch.Tensor:
    return jacobians @ jacobians.mT


def combined(weights: torch.Tensor, jacobians: torch.Tensor) -> torch.Tensor:
    return (weights[..., None, :] @ jacobians)[..., 0, :]


def size(weights: torch.Tensor, jacobians: torch.Tensor) -> torch.Tensor:
    """How long the direction would be, did the weighted rows not cancel."""
    return (weights.abs() * jacobians.norm(dim=-1)).sum(-1)


# What is exported.


def test_methods_are_found() -> None:
    assert {"Sum", "Mean", "PCGrad"} <= set(RULES) <= set(EXPORTED)


def test_what_is_defined_is_exported() -> None:
    for cls in defined():
        assert exported().get(cls.__name__) is cls, cls
        assert getattr(gk, cls.__name__) is cls


@pytest.mark.parametrize("name", EXPORTED)
def test_it_can_be_made(name: str) -> None:
    assert type(made(name, 3)) is exported()[name]
    assert made(name, 3) is not made(name, 3)


def test_an_entry_is_needed_where_the_defaults_do_not_do() -> None:
    class Needy(gk.Transform):
        def __init__(self, argument: int) -> None: ...

    with pytest.raises(TypeError, match="argument"):
        entry(Needy).make(3)


@pytest.mark.parametrize("name", EXPORTED)
def test_its_docstring_says_what_users_must_know(name: str) -> None:
    text = inspect.getdoc(exported()[name])
    assert "Cost:" in text
    assert "State:" in text
    assert "http" in text or METHODS[name].trivial
    if name not in RULES:
        return
    assert "omogene" in text
    stated = re.search(r"omogeneous of degree\s+([\d.]*\d)\.", text)
    assert stated is None or float(stated[1]) == made(name, 3).degree


@pytest.mark.parametrize("name", METHODS)
def test_its_repr_shows_its_arguments(name: str) -> None:
    method = made(name, 3)
    before = torch.get_rng_state()
    shown = repr(method)
    assert torch.equal(torch.get_rng_state(), before)
    if dataclasses.is_dataclass(method):
        for field in dataclasses.fields(method):
            assert (f"{field.name}=" in shown) == (field.name != "generator"), field.name
    elif name not in EXPORTED:
        return
    if not METHODS[name].unreadable:
        again = eval(shown, {**vars(gk), name: type(method)})
        assert repr(again) == shown


WRONG = {
    r"Scope": [("layer", ValueError)],
    r"Literal\[": [("nonsense", ValueError)],
    r"float\b": [(math.nan, ValueError), ("1", TypeError)],
    r"torch\.Generator": [(3, TypeError)],
    r"Preference": [
        ("abc", TypeError),
        ([math.nan] * 3, ValueError),
        ([True] * 3, TypeError),
        (["1"] * 3, TypeError),
    ],
}


@pytest.mark.parametrize("name", METHODS)
def test_wrong_arguments_are_named(name: str) -> None:
    cls = type(made(name, 3))
    if not dataclasses.is_dataclass(cls):
        return
    for field in dataclasses.fields(cls):
        for annotation, cases in WRONG.items():
            if not (field.init and re.match(annotation, str(field.type))):
                continue
            for value, error in cases:
                with as_users_run_it(), pytest.raises(error, match=field.name):
                    cls(**{**arguments(made(name, 3)), field.name: value})


def arguments(method: gk.Transform) -> dict[str, object]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


# What a rule computes.


@every_rule
@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_give_what_a_loop_gives(name: str, count: int) -> None:
    """Twice, since some rules remember; what is not finite disturbs none of its neighbours."""
    _, bank = stacked(count)
    bank = torch.cat([bank[:1], bank[-1:], bank])
    bank[1, 0] = torch.nan
    bank = bank.unflatten(0, (2, -1))
    rule = made(name, count, seed=1)
    others = [[made(name, count, seed=1) for _ in row] for row in bank]
    for step, jacobians in enumerate((bank, 2 * bank.flip(-2))):
        grams = products(jacobians)
        found = weights(rule, grams, step)
        assert found.shape == grams.shape[:-1]
        pairs = zip(chain(*others), grams.flatten(0, 1), strict=True)
        expected = torch.stack([weights(*pair, step) for pair in pairs]).unflatten(0, (2, -1))
        assert torch.equal(found.isnan(), expected.isnan())
        error = combined(found - expected, jacobians).norm(dim=-1)
        bound = METHODS[name].rounding * size(expected, jacobians)
        nothing = 1e-12 * size(expected[:1, :1], jacobians)  # where all cancel
        assert not (error > bound + nothing).any()


@every_rule
def test_a_single_gradient_keeps_its_direction(name: str) -> None:
    for factor in (*FACTORS, 0.0):
        rule = made(name, 1)
        for _ in range(3):
            (weight,) = weights(rule, torch.tensor([[factor]], dtype=torch.float64))
            assert math.isfinite(weight)
            assert weight > 0 or factor == 0 or METHODS[name].silent


@every_rule
@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_is_homogeneous_of_its_degree(name: str, count: int) -> None:
    """Powers of 2 leave no rounding that an unusual matrix could magnify."""
    degree = made(name, count).degree
    if degree is None:
        return
    names, unusual = stacked(count)
    usual = torch.stack([normal(count, 8, seed=k) for k in range(8)])
    cases = [(usual, factor) for factor in FACTORS]
    cases += [(unusual, 2.0**power) for power in (-20, 20)]
    for jacobians, factor in cases:
        once, scaled = made(name, count, seed=2), made(name, count, seed=2)
        for step, rows in enumerate((jacobians, jacobians.flip(-2))):
            expected = weights(once, products(rows), step)
            found = weights(scaled, factor**2 * products(rows), step) * factor ** (1 - degree)
            # Weights of gradients that depend on each other need not be equal.
            error = combined(found - expected, rows).norm(dim=-1)
            wrong = error > METHODS[name].tolerance * size(expected, rows)
            assert not wrong.any(), (factor, [*compress(names, wrong)])


@every_rule
def test_the_order_of_objectives_does_not_matter(name: str) -> None:
    """To rules that do not say why it does; to those that do it must."""
    assert order_matters(name) == bool(METHODS[name].ordered), METHODS[name].ordered


def order_matters(name: str) -> bool:
    for count in (2, 4):
        order = torch.tensor([*range(1, count), 0])
        one, other = made(name, count, seed=3), made(name, count, seed=3)
        for seed in range(6):
            gram = products(normal(count, 6, seed=seed))
            values = losses(count, seed)
            found = one.weights(gram, values)[order]
            expected = other.weights(gram[order][:, order], values[order])
            if not torch.allclose(found, expected, rtol=1e-7, atol=1e-9):
                return True
    return False


@every_rule
@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_finite_whatever_the_gradients(name: str, count: int, dtype: torch.dtype) -> None:
    names, jacobians = stacked(count)
    grams = products(jacobians).to(dtype)  # float32: on devices without float64
    rule = made(name, count)
    for _ in range(3):
        found = weights(rule, grams)
        assert found.dtype == dtype
        assert found.isfinite().all(), [*compress(names, ~found.isfinite().all(-1))]
        assert combined(found.double(), jacobians).isfinite().all()


@every_rule
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_what_is_not_finite_stays_so(name: str, count: int) -> None:
    names, jacobians = stacked(count)
    for value in (torch.nan, torch.inf):
        for spoilt in range(count):
            jacobians[:, spoilt, 0] = value
            rule = made(name, count)
            found = weights(rule, products(jacobians))
            direction = combined(found, jacobians)
            assert not direction.isfinite().all(-1).any()
            if math.isnan(value) and not METHODS[name].blind:
                assert found.isnan().any(-1).all(), [*compress(names, ~found.isnan().any(-1))]
            jacobians[:, spoilt] = 1.0
        assert not alone(made(name, count), torch.full((count, 3), value)).isfinite().any()


@every_rule
def test_it_only_reads_what_it_is_given(name: str) -> None:
    rule = made(name, 3)
    for jacobian in matrices(3).values():
        gram, values = products(jacobian), losses(3)
        given = jacobian, gram, values
        before = [tensor.clone() for tensor in given]
        rule(jacobian, values)
        rule.weights(gram, values)
        rule.weights(gram.expand(2, 3, 3), values)
        assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


@every_rule
def test_it_keeps_no_graph(name: str) -> None:
    """Losses as a forward pass leaves them, gradients that were taken with create_graph."""
    rule, other = made(name, 3, seed=1), made(name, 3, seed=1)
    for step in range(2):
        jacobian, values = normal(3, 6, seed=step), losses(3, step)
        found = rule(jacobian.clone().requires_grad_(), values.clone().requires_grad_())
        assert not found.requires_grad
        assert torch.equal(found, other(jacobian, values))
    assert not any(torch.is_tensor(v) and v.requires_grad for v in rule.state.values())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_come_back_as_they_went_in(name: str, dtype: torch.dtype) -> None:
    narrow, wide, other = (made(name, 4, seed=4) for _ in range(3))
    for seed in range(3):
        jacobian = normal(4, 6, seed=seed).to(dtype)
        exact = jacobian.double()
        found, expected = alone(narrow, jacobian), alone(wide, exact)
        assert found.dtype == dtype
        error = (found.double() - expected).norm()
        bound = size(weights(other, products(exact)), exact)
        assert error <= 4 * torch.finfo(dtype).eps * bound


@every_rule
@pytest.mark.parametrize("how", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_a_copy_goes_on_as_the_rule_itself_does(name: str, how) -> None:
    rule = made(name, 4, seed=5)
    for seed in range(2):
        weights(rule, products(normal(4, 6, seed=seed)))
    twin = how(rule)
    for seed in range(2, 5):
        gram = products(normal(4, 6, seed=seed))
        assert torch.equal(weights(rule, gram), weights(twin, gram))


@every_rule
def test_it_forgets_when_it_is_told_to(name: str) -> None:
    rule, new = made(name, 4, seed=6), made(name, 4, seed=6)
    for seed in range(2):
        weights(rule, products(normal(4, 6, seed=seed)))
    rule.reset()
    if rule.generator is not None:
        rule.generator.manual_seed(6)
    for seed in range(2, 4):
        gram = products(normal(4, 6, seed=seed))
        assert torch.equal(weights(rule, gram), weights(new, gram))


@every_rule
def test_its_random_numbers_are_its_generators(name: str) -> None:
    if made(name, 4).generator is None:
        return
    before = torch.get_rng_state()
    runs = []
    for seed in (7, 7, 8, None, None):
        rule = made(name, 4, seed)
        runs.append([weights(rule, products(normal(4, 6, seed=k))).tolist() for k in range(6)])
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    assert runs[3] == runs[4]


class WaitsSeen(TorchDispatchMode):
    """Sees operations whose result the host of an accelerator would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        waits = {"_local_scalar_dense", "nonzero", "_linalg_eigh", "_linalg_svd", "linalg_lstsq"}
        if name in waits:
            self.found.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [2, 3])
@every_rule
def test_what_makes_the_host_wait_is_computed_on_the_host(name: str, count: int) -> None:
    rule, gram = made(name, count), products(normal(count, 5))
    seen = losses(count) if rule.needs_losses else None
    with as_users_run_it(), WaitsSeen() as waits:
        rule.weigh_alone(gram, seen)
    assert bool(waits.found) == rule.solves(count), waits.found
